"""Tokens, parameters and FLOPs of a base and of its upgrade, counted on the meta device.

`davae inspect`, the dry run and the estimate of a run's time take their figures from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from davae.backbones.expand import expand_transformer
from davae.backbones.trainable import choose_trainable
from davae.cost.flops import (
    Flops,
    count,
    meta_autoencoder,
    meta_detail_vae,
    meta_transformer,
    transformer_flops,
)
from davae.latent import LatentLayout
from davae.pretrained.shapes import BaseShapes
from davae.recipes.sections import Lora


@dataclass(frozen=True)
class TokenPlan:
    """Work of a native and of an upgraded transformer on one square image.

    Attributes:
        native, upgraded: FLOPs of one transformer pass, text included.
    """

    resolution: int
    native_tokens: int
    upgraded_tokens: int
    native: Flops
    upgraded: Flops

    @property
    def native_flops(self) -> float:
        return self.native.total

    @property
    def upgraded_flops(self) -> float:
        return self.upgraded.total

    @property
    def bound(self) -> float:
        """Upper bound of the transformer's speed-up."""
        return self.native_flops / self.upgraded_flops


@dataclass(frozen=True)
class MetaUpgrade:
    """Modules of a base model and of its upgrade, without weights, each made on first use.

    A module that cannot be made with the layout raises ValueError.
    """

    shapes: BaseShapes
    layout: LatentLayout
    detail_offset: float = 0.0

    @cached_property
    def base(self) -> Any:
        """Transformer of the base model."""
        with torch.device("meta"):
            return meta_transformer(self.shapes)

    @cached_property
    def expanded(self) -> Any:
        """Transformer of the upgrade."""
        return self._expand()

    @cached_property
    def base_vae(self) -> Any:
        """Autoencoder of the base model."""
        return meta_autoencoder(self.shapes)

    @cached_property
    def detail_vae(self) -> Any:
        """Autoencoder of the upgrade."""
        return meta_detail_vae(self.shapes, self.layout.detail_channels, self.layout.scale)

    def _expand(self) -> Any:
        with torch.device("meta"):
            return expand_transformer(self.base, self.layout.detail_channels, detail_offset=self.detail_offset)

    def trained(self, lora: Lora | None) -> int:
        """Return how many parameters stage 2 trains, with a LoRA or all."""
        transformer = self._expand()  # which choose_trainable changes
        with torch.device("meta"):
            return count(choose_trainable(transformer, lora))

    def tokens(self, resolution: int) -> TokenPlan:
        """Return tokens and FLOPs of native and upgraded transformer at `resolution` pixels.

        Raises:
            ValueError: the resolution does not divide into tokens.
        """
        check_resolution(self.shapes, resolution, self.layout.scale)
        native, upgraded = token_counts(self.shapes, resolution, self.layout.scale)
        side = resolution // self.shapes.vae_factor
        old, new = transformer_flops(self.base, side), transformer_flops(self.expanded, side // self.layout.scale)
        return TokenPlan(resolution, native, upgraded, old, new)


def check_resolution(shapes: BaseShapes, resolution: int, scale: int) -> None:
    """Check that an upgraded image divides into tokens.

    Args:
        resolution: pixels of the upgraded image.
        scale: of the upgrade.

    Raises:
        ValueError: it does not; the message names the nearest sizes that do.
    """
    step = shapes.vae_factor * shapes.patch_size * scale
    if resolution % step or resolution < step:
        below = resolution // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise ValueError(
            f"resolution {resolution} is not divisible by {step} (autoencoder factor {shapes.vae_factor} x patch "
            f"{shapes.patch_size} x scale {scale}); use {nearest}"
        )


def token_counts(shapes: BaseShapes, resolution: int, scale: int) -> tuple[int, int]:
    """Return the image tokens of the native and of the upgraded transformer."""
    native = (resolution // (shapes.vae_factor * shapes.patch_size)) ** 2
    return native, native // scale**2


def token_plan(shapes: BaseShapes, resolution: int, scale: int, detail_channels: int | None = None) -> TokenPlan:
    """Return tokens and FLOPs of native and upgraded transformer at `resolution` pixels.

    Args:
        scale: of the upgrade.
        detail_channels: D; C by default.

    Raises:
        ValueError: the resolution does not divide into tokens.
    """
    check_resolution(shapes, resolution, scale)
    return MetaUpgrade(shapes, LatentLayout(shapes.channels, detail_channels or shapes.channels, scale)).tokens(
        resolution
    )
