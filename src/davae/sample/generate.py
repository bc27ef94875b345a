"""Sampling through stock pipelines, with noise that a base model and its upgrade can share."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from davae.backbones.classes import goes_by_class
from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.pretrained.shapes import check_drawable, default_resolution, pixel_factor, token_side
from davae.sample.call import call_pipeline, prompts_at_a_time, seeded_steps, takes_noise
from davae.sample.open import DEFAULT_OPTIONS, SamplingOptions
from davae.sample.preview import Preview, watching
from davae.train.random import named_generator
from davae.vae.base import base_channels
from davae.vae.detail_vae import DetailVAE

BASE, DETAIL = 0, 1  # purposes of starting noise


def base_noise(seed: int, index: int, channels: int, height: int, width: int) -> Tensor:
    """Return standard normal noise (1,C,h,w) of an image, equal for a base and its upgrade.

    Args:
        seed, index: seed of all images, number of the image.
        channels, height, width: C, h and w, in latent positions.
    """
    return torch.randn(1, channels, height, width, generator=_generator(seed, index, BASE))


def structured_noise(seed: int, index: int, layout: LatentLayout, height: int, width: int) -> Tensor:
    """Return noise (1,C+D,h,w) whose base part is `base_noise` of this seed and index.

    Args:
        seed, index: seed of all images, number of the image.
        layout: channels of base and detail.
        height, width: in latent positions.
    """
    z = base_noise(seed, index, layout.base_channels, height, width)
    z_d = torch.randn(1, layout.detail_channels, height, width, generator=_generator(seed, index, DETAIL))
    return layout.join(z, z_d)


def _generator(seed: int, index: int, purpose: int) -> torch.Generator:
    seed, index = operator.index(seed), operator.index(index)
    if not 0 <= seed < 2**31:  # the CPU's generator keeps 32 bits of a seed, and larger ones would repeat small ones
        return named_generator("noise", seed, index, purpose)
    return seeded_generator((seed * 1_000_003 + index) * 2 + purpose)


def step_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of the noise that a stochastic scheduler adds to an image.

    Its seed is a hash: the CPU's generator keeps the low 32 bits of a seed alone, so that a large offset would give the
    starting noise again.
    """
    return named_generator("steps", seed, index)


def seeded_generator(seed: int) -> torch.Generator:
    """Return a generator of a seed of any size: beyond 64 bits it is taken modulo 2**64."""
    return torch.Generator().manual_seed(seed if -(2**63) <= seed < 2**64 else seed % 2**64)


def start_noise(pipeline: Any, seed: int, index: int, resolution: int | tuple[int, int]) -> Tensor:
    """Return the starting noise of one image, structured for an upgraded pipeline.

    Args:
        pipeline: the pipeline that draws.
        seed, index: seed of all images, number of the image.
        resolution: pixels of a square's side, or (height, width).
    """
    factor = pixel_factor(pipeline)
    height, width = (side // factor for side in _height_width(resolution))
    vae = pipeline.vae
    if isinstance(vae, DetailVAE):
        return structured_noise(seed, index, vae.layout, height, width)
    return base_noise(seed, index, base_channels(vae.config, type(vae).__name__), height, width)


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def checked_size(pipeline: Any, size: int | tuple[int, int] | None) -> int | tuple[int, int]:
    """Return the size at which a pipeline draws: a square's side, or (height, width).

    Raises:
        ModelError: it does not divide into tokens, has more of them than the model has positions for or an area that the
            pipeline would rescale, or is a rectangle of a model that draws squares.
    """
    size, step = size or default_resolution(pipeline), token_side(pipeline)
    if wrong := [side for side in _height_width(size) if side % step]:
        nearest = max(1, round(wrong[0] / step)) * step
        raise ModelError(f"{wrong[0]} pixels are not divisible by {step}, a token's side; use {nearest}")
    height, width = _height_width(size)
    check_drawable(pipeline, height, width)
    if height != width and goes_by_class(pipeline):
        raise ModelError(f"a {type(pipeline).__name__} draws squares, {width} x {height} is none; use --resolution")
    return size


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: list[str],
    options: SamplingOptions = DEFAULT_OPTIONS,
    *,
    output_type: str = "pil",
    negative_prompt: str | None = None,
    first: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    preview: Preview | None = None,
) -> list[Any]:
    """Draw one image a prompt.

    Image i depends on the seed and its number first + i alone, not on the batch.

    Args:
        pipeline: a stock diffusers text-to-image pipeline, or one whose prompts are classes by name or number
            (ClassConditionalPipeline, DiTPipeline); base or upgraded.
        prompts: texts or classes.
        options: steps, guidance, seed, size and batch size; the placement is the one that the pipeline was opened with.
        output_type: `pil` for images, `pt` for tensors (3,H,W) in [0,1].
        negative_prompt: what to guide away from; None is the pipeline's own, the empty prompt in most.
        first: number of the first image.
        on_batch: called after each batch with the images that are done and their number.
        preview: receives the base while it is drawn.

    Returns:
        The images, in the order of the prompts.

    Raises:
        ModelError: a size that does not divide into tokens; a negative prompt that the pipeline would ignore.
    """
    size = checked_size(pipeline, options.resolution)
    # a pipeline that takes no noise draws it, the base part first, from these; else only stochastic schedulers do
    own = step_generator if takes_noise(pipeline) else partial(_generator, purpose=BASE)
    images: list[Any] = []
    batch_size = prompts_at_a_time(pipeline, options.batch_size, options.guidance)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        numbers = range(first + start, first + start + len(part))
        generators = [own(options.seed, number) for number in numbers]
        drawing = seeded_steps(pipeline, generators)
        with watching(drawing, preview) as callback:
            result = call_pipeline(
                drawing,
                part,
                size,
                steps=options.steps,
                guidance_scale=options.guidance,
                negative_prompt=negative_prompt,
                latents=torch.cat([start_noise(pipeline, options.seed, number, size) for number in numbers]),
                generator=generators,
                output_type=output_type,
                callback_on_step_end=callback,
            )
        images += result.images
        on_batch(len(images), len(prompts))
    return images
