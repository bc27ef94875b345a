"""Sampling through stock pipelines, with noise that a base model and its upgrade can share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from davae.latent import LatentLayout
from davae.models.autoencoder_families import base_channels
from davae.models.detail_vae import DetailVAE
from davae.models.pipeline import ModelError, default_resolution, pixel_factor, token_side
from davae.sample.call import call_pipeline, takes_noise

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
        pipeline: a stock diffusers text-to-image pipeline, or one whose prompts are classes by name or number
            (ClassConditionalPipeline, DiTPipeline); base or upgraded.
        output_type: `pil` for pictures, `pt` for tensors (3,H,W) in [0,1].
        resolution: pixels; None is the pipeline's own size.

    Raises:
        ModelError: a size that does not divide into tokens.
    """
    size = resolution or default_resolution(pipeline)
    step = token_side(pipeline)
    if size % step:
        raise ModelError(
            f"{size} pixels are not divisible by {step}, a token's side; use {max(1, round(size / step)) * step}"
        )
    # a pipeline that takes no noise draws it, the base part first, from these; else only stochastic schedulers do
    purpose = STEPS if takes_noise(pipeline) else BASE
    pictures: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        numbers = range(first + start, first + start + len(part))
        result = call_pipeline(
            pipeline,
            part,
            size,
            steps=steps,
            guidance_scale=guidance_scale,
            latents=torch.cat([start_noise(pipeline, seed, number, size) for number in numbers]),
            generator=[_generator(seed, number, purpose) for number in numbers],
            output_type=output_type,
        )
        pictures += result.images
        on_batch(len(pictures), len(prompts))
    return pictures
