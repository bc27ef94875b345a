"""Sampling through stock pipelines, with noise that a base model and its upgrade can share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.pretrained.open import default_resolution, pixel_factor, token_side
from davae.sample.call import at_a_time, call_pipeline, takes_noise
from davae.sample.preview import Preview, watching
from davae.vae.base import base_channels
from davae.vae.detail_vae import DetailVAE

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


def start_noise(pipeline: Any, seed: int, index: int, resolution: int | tuple[int, int]) -> Tensor:
    """Return noise for one image of a square's side or (height, width) in pixels, structured for an upgraded pipeline."""
    factor = pixel_factor(pipeline)
    height, width = (side // factor for side in _height_width(resolution))
    vae = pipeline.vae
    if isinstance(vae, DetailVAE):
        return structured_noise(seed, index, vae.layout, height, width)
    return base_noise(seed, index, base_channels(vae.config, type(vae).__name__), height, width)


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: list[str],
    *,
    output_type: str = "pil",
    resolution: int | tuple[int, int] | None = None,
    negative_prompt: str | None = None,
    steps: int = 30,
    guidance_scale: float = 2.5,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    preview: Preview | None = None,
) -> list[Any]:
    """One picture a prompt. Picture number first+i depends on the seed and its number, not on the batch.

    Args:
        pipeline: a stock diffusers text-to-image pipeline, or one whose prompts are classes by name or number
            (ClassConditionalPipeline, DiTPipeline); base or upgraded.
        output_type: `pil` for pictures, `pt` for tensors (3,H,W) in [0,1].
        resolution: pixels of a square's side, or (height, width); None is the pipeline's own size.
        negative_prompt: what to guide away from; None is the pipeline's own, the empty prompt in most.
        preview: looks at the base while it is drawn.

    Raises:
        ModelError: a size that does not divide into tokens; a negative prompt that the pipeline would ignore.
    """
    size = resolution or default_resolution(pipeline)
    step = token_side(pipeline)
    for side in _height_width(size):
        if side % step:
            raise ModelError(
                f"{side} pixels are not divisible by {step}, a token's side; use {max(1, round(side / step)) * step}"
            )
    # a pipeline that takes no noise draws it, the base part first, from these; else only stochastic schedulers do
    purpose = STEPS if takes_noise(pipeline) else BASE
    pictures: list[Any] = []
    batch_size = at_a_time(pipeline, batch_size, guidance_scale)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        numbers = range(first + start, first + start + len(part))
        with watching(pipeline, preview) as callback:
            result = call_pipeline(
                pipeline,
                part,
                size,
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                latents=torch.cat([start_noise(pipeline, seed, number, size) for number in numbers]),
                generator=[_generator(seed, number, purpose) for number in numbers],
                output_type=output_type,
                callback_on_step_end=callback,
            )
        pictures += result.images
        on_batch(len(pictures), len(prompts))
    return pictures
