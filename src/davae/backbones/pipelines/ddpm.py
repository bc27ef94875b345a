"""Subclasses of stock pipelines, for models trained by DDPM, that cannot draw an upgrade by default: each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanDiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import SUPPORTED_SHAPE, map_to_standard_shapes

from davae.backbones.families.pixart import rotary_table


class ScaledBins(PixArtImageProcessor):
    """The base's table of sizes, all its sides times the upgrade's scale."""

    def __init__(self, vae_scale_factor: int, scale: int):
        super().__init__(vae_scale_factor=vae_scale_factor)
        self.scale = scale

    def classify_height_width_bin(self, height: int, width: int, ratios: dict) -> tuple[int, int]:  # type: ignore[override]
        """Height and width in pixels of the entry nearest in aspect ratio."""
        rows, columns = PixArtImageProcessor.classify_height_width_bin(height, width, ratios)
        return rows * self.scale, columns * self.scale


class _ScaledTable:
    """Puts ScaledBins in place. Arguments are named, for diffusers reads a pipeline's parts off them."""

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)  # type: ignore[call-arg]
        self.image_processor = ScaledBins(vae.spatial_factor, vae.layout.scale)


class DetailPixArtAlphaPipeline(_ScaledTable, PixArtAlphaPipeline):
    """PixArt-alpha with an upgraded model.

    The stock class draws every picture at a size out of a table of the *base's* pixels and enlarges it: an upgrade
    from 1024 to 2048 would draw 1024. Here the table is scaled. The stock class does as well with
    `use_resolution_binning=False`.
    """


class DetailPixArtSigmaPipeline(_ScaledTable, PixArtSigmaPipeline):
    """PixArt-Sigma with an upgraded model; the reason is `DetailPixArtAlphaPipeline`'s."""


class DetailHunyuanDiTPipeline(HunyuanDiTPipeline):
    """Hunyuan-DiT with an upgraded model.

    The stock class makes the table of rotary positions for latents of 8 pixels a side, a number in its code, and fails
    on any others; it also has a table of the base's sizes, and tells the model the picture's size. Here positions follow
    the latents, the table is scaled, and the model is told the base's size, as it was in training.
    """

    def __call__(
        self,
        prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        *args: Any,
        target_size: tuple[int, int] | None = None,
        use_resolution_binning: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As the stock pipeline's; the last two by name. `target_size` is in the base's pixels."""
        scale = self.vae.layout.scale
        default = self.default_sample_size * self.vae_scale_factor
        rows, columns = (height or default) // scale // 16 * 16, (width or default) // scale // 16 * 16  # the base's
        if use_resolution_binning and (rows, columns) not in SUPPORTED_SHAPE:
            columns, rows = map_to_standard_shapes(columns, rows)
        handle = self.transformer.register_forward_pre_hook(follow_latents, with_kwargs=True)
        try:
            return super().__call__(
                prompt,
                rows * scale,
                columns * scale,
                *args,
                target_size=target_size or (rows, columns),
                use_resolution_binning=False,
                **kwargs,
            )
        finally:
            handle.remove()


def follow_latents(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Before a pass of Hunyuan-DiT: positions for the latents (B,c,h,w) that it gets."""
    height, width = args[0].shape[-2:]
    return args, {**kwargs, "image_rotary_emb": rotary_table(model.config, height, width, args[0].device)}


# A pipeline's model_index.json names its class; diffusers finds it among the names of a library that is imported.
for _pipeline in (DetailPixArtAlphaPipeline, DetailPixArtSigmaPipeline, DetailHunyuanDiTPipeline):
    _pipeline.__module__ = "davae"
