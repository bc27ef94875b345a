"""Sampling through stock pipelines, with noise that a base model and its upgrade can share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from davae.latent import LatentLayout
from davae.models.autoencoder_families import base_channels
from davae.models.calls import CALLS
from davae.models.detail_vae import DetailVAE
from davae.models.pipeline import (
    default_resolution,
    guidance_arguments,
    literal_prompts,
    pixel_factor,
    text_arguments,
)

BASE, DETAIL, STEPS = 0, 1, 1 << 62  # what noise is for


def base_noise(seed: int, index: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal (1,C,h,w) of picture `index`: the same for a base model and for its upgrade."""
    return torch.randn(1, channels, height, width, generator=_generator(seed, index, BASE))


def structured_noise(seed: int, index: int, layout: LatentLayout, height: int, width: int) -> Tensor:
    """(1,C+D,h,w) whose base part is `base_noise` of the same seed and index."""
    z = base_noise(seed, index, layout.base_channels, height, width)
    z_d = torch.randn(1, layout.detail_channels, height, width, generator=_generator(seed, index, DETAIL))
    return layout.join(z, z_d)


def _generator(seed: int, index: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + purpose)


def start_noise(pipeline: Any, seed: int, index: int, resolution: int) -> Tensor:
    """Noise for one picture of `resolution` pixels, structured where the pipeline is an upgraded one."""
    side = resolution // pixel_factor(pipeline)
    vae = pipeline.vae
    if isinstance(vae, DetailVAE):
        return structured_noise(seed, index, vae.layout, side, side)
    return base_noise(seed, index, base_channels(vae.config, type(vae).__name__), side, side)


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: list[str],
    *,
    output_type: str = "pil",
    resolution: int | None = None,
    steps: int = 30,
    guidance_scale: float = 2.5,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Any]:
    """One picture a prompt. Picture number first+i depends on the seed and its number, not on the batch.

    Args:
        pipeline: a stock diffusers text-to-image pipeline, or a ClassConditionalPipeline whose prompts are classes by name
            or number; base or upgraded.
        output_type: `pil` for pictures, `pt` for tensors (3,H,W) in [0,1].
        resolution: pixels; None is the pipeline's own size.
    """
    size = resolution or default_resolution(pipeline)
    call = CALLS.get(type(pipeline.transformer).__name__)  # none: classes, and latents as they are
    pictures: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = [start_noise(pipeline, seed, first + start + i, size) for i in range(len(part))]
        latents = torch.cat(noise).to(pipeline.transformer.device, pipeline.transformer.dtype)
        result = pipeline(
            prompt=part,
            height=size,
            width=size,
            num_inference_steps=steps,
            latents=(call.pack(latents) if call else latents),
            # only stochastic schedulers draw from these
            generator=[_generator(seed, first + start + i, STEPS) for i in range(len(part))],
            output_type=output_type,
            **guidance_arguments(pipeline, guidance_scale, len(part)),
            **text_arguments(pipeline),
            **literal_prompts(pipeline),
        )
        pictures += result.images
        on_batch(len(pictures), len(prompts))
    return pictures


def grid(pictures: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Equal pictures in rows on white."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet
