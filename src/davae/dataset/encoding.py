"""Latents of images by a frozen autoencoder, as many images at a time as the device takes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from davae.cost.memory import decode_sampling_bytes, encode_bytes
from davae.pretrained.memory_budget import TILE, Halving, free_bytes, largest_batch
from davae.pretrained.placement import send
from davae.recipes.sections import Run
from davae.recipes.upgrade import Recipe
from davae.vae.blocks import downsample
from davae.vae.codec import Codec

logger = logging.getLogger(__name__)

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_precision(run: Run) -> torch.dtype:
    """Return the precision that a run computes in."""
    return PRECISIONS[run.mixed_precision]


def report_precision(recipe: Recipe) -> torch.dtype:
    """Return the precision in which the report of a run draws: `report.dtype`, else the run's."""
    return getattr(torch, recipe.report.dtype) if recipe.report.dtype else run_precision(recipe.run)


def images_at_a_time(given: int | None, at_most: int, device: torch.device, one: Callable[[], int]) -> int:
    """Return how many images a device draws or decodes at a time, in this process.

    Args:
        given: the recipe's own number.
        at_most: without one; what the CPU takes.
        one: plans the bytes of one image.
    """
    free = free_bytes(device)
    return given or (at_most if free is None else largest_batch(one(), free, at_most))


def coding_bytes(vae: Any, pixels: int, precision: torch.dtype) -> int:
    """Return the most that encoding and decoding one square image holds.

    Args:
        vae: the autoencoder, whose config is read.
    """
    with torch.device("meta"):
        bare = type(vae).from_config(vae.config)
    codec = Codec(vae)
    decoding = decode_sampling_bytes(copy.deepcopy(bare), codec.channels, pixels // codec.factor, precision)
    return max(encode_bytes(bare, pixels, precision), decoding) + 4 * 3 * pixels**2


class Encoder:
    """Images (B,3,H,W) on any device -> raw latents (B,c,h,w), float32, without noise.

    On a GPU the number of images at a time comes from the memory plan, and tiles are used where one whole image does not fit.
    When memory runs out all the same, the number is halved, then tiles are used. Latents of float16 that are not finite are
    computed again in float32.

    Args:
        vae: on its device, in float32; it stays as it is.
        precision: of the weights that encode.
        at_most: images at a time.
        what: the work, for the log.
        smaller: factor by which images are downsampled first.
    """

    def __init__(
        self, vae: Any, precision: torch.dtype, at_most: int, what: str = "latent cache", *, smaller: int = 1
    ):
        self.vae, self.precision, self.at_most, self.smaller = vae, precision, at_most, smaller
        self.own: Any = vae if precision == torch.float32 else nn.Module.to(copy.deepcopy(vae), precision)
        self.halving = Halving(what, at_most, self._tile if hasattr(vae, "enable_tiling") else None)
        self._planned: set[tuple[int, ...]] = set()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self._plan(images)
        return self.halving(self._encode, images)

    def _encode(self, images: Tensor) -> Tensor:
        there = send(images, self.vae.device, torch.channels_last)
        there = downsample(there, self.smaller) if self.smaller > 1 else there
        latents = Codec(self.own).encode_raw(there.to(self.precision)).float()
        if self.precision == torch.float16 and not bool(torch.isfinite(latents).all()):
            logger.warning("%s: latents overflow in float16; computed again in float32", self.halving.what)
            latents = Codec(self.vae).encode_raw(there)
        return latents

    def _tile(self) -> None:
        self.own.enable_tiling(TILE)
        if self.vae is not self.own:
            self.vae.enable_tiling(TILE)

    def _plan(self, images: Tensor) -> None:
        """Choose how many images of this size go at a time, from the memory that is free."""
        size = tuple(images.shape[1:])
        free = free_bytes(self.vae.device)
        if free is None or size in self._planned:
            return
        self._planned.add(size)
        pixels = max(size[1:]) // self.smaller
        one = encode_bytes(self._bare(), pixels, self.precision)
        if one > free and self.halving.alone is not None:
            self._tile()
            self.halving.alone = None
            one = encode_bytes(self._bare(), pixels, self.precision, TILE)
        chosen = largest_batch(one, free, self.at_most)
        if chosen != self.halving.size:
            logger.info("%s: %d images of %d pixels at a time", self.halving.what, chosen, pixels)
        self.halving.size = min(self.halving.size, chosen)

    def _bare(self) -> Any:
        """Return the autoencoder without weights."""
        with torch.device("meta"):
            return type(self.vae).from_config(self.vae.config)
