"""Frozen transformers of `stage1.dit_alignment` and `stage2.hold_base` in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from davae.backbones.expand import expand_transformer
from davae.backbones.families import family_of
from davae.cost.flops import meta_transformer, transformer_flops
from davae.latent import LatentLayout
from davae.losses.flow_matching import FlowMatching
from davae.pretrained.shapes import BaseShapes
from davae.recipes.sections import Stage1, Stage2
from davae.tasks.dit_alignment import FrozenFeatures
from davae.train.random import SampleRandom


class Undrawn(SampleRandom):
    """Random draws of a rehearsal, inside `fake_mode`: shapes alone, in no time for any batch."""

    def __init__(self, count: int):
        super().__init__(0, "rehearsal", 0, 0, 0)
        self.count = count

    def uniform(self) -> Tensor:
        return torch.empty(self.count)

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape)


@dataclass(frozen=True)
class UndrawnLevels(FlowMatching):
    """Flow matching of a rehearsal, for a batch of `count`."""

    count: int = 1

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        return torch.empty(self.count)


def meta_features(
    shapes: BaseShapes, layout: LatentLayout, settings: Stage1, dtype: torch.dtype
) -> FrozenFeatures | None:
    """Return the frozen transformer of `stage1.dit_alignment` without weights, None without it."""
    if settings.dit_alignment is None or not settings.dit_alignment.weight:
        return None
    transformer = nn.Module.to(meta_transformer(shapes), dtype)  # without diffusers' advice
    call = family_of(transformer).require_call()
    null = call.blank(cast(Any, transformer).config)
    objective = UndrawnLevels(count=settings.batch_size)
    return FrozenFeatures(transformer, call, layout, objective, null, settings.dit_alignment.depth)


def held_base_cost(
    shapes: BaseShapes, layout: LatentLayout, side: int, settings: Stage2, dtype: torch.dtype
) -> tuple[int, float]:
    """Return bytes and FLOPs of the frozen transformer of `stage2.hold_base`, zero without it.

    Its activations do not add: the pass ends before that of the trained transformer begins.
    """
    if not settings.hold_base:
        return 0, 0.0
    with torch.device("meta"):
        frozen = expand_transformer(meta_transformer(shapes), layout.detail_channels)
    weights = sum(parameter.numel() for parameter in frozen.parameters()) * dtype.itemsize
    return weights, transformer_flops(frozen, side).total * settings.batch_size
