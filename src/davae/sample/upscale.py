"""Enlarging: an image becomes the base, and the upgraded model draws its detail."""

from __future__ import annotations

import logging
import math
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from davae.backbones.classes import goes_by_class
from davae.backbones.expand import CLEAN_BASE
from davae.backbones.families import denoiser, family_of
from davae.data.decoding import converted_image, fault_of_one
from davae.data.images import to_images, to_tensor
from davae.errors import ModelError, UnreadableImage
from davae.pretrained.memory_budget import TILE
from davae.pretrained.shapes import check_drawable, default_resolution, pixel_factor, token_side
from davae.sample.canvas import Enlargement, WindowGrid
from davae.sample.draw_detail import OnBase, draw_detail, free_steps
from davae.sample.finite import finite_images, remedy
from davae.sample.generate import seeded_generator, structured_noise
from davae.sample.open import check_class_prompts
from davae.vae.blocks import downsample
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range, in_range

logger = logging.getLogger(__name__)

Prompt = str | SupportsIndex
MOST_PIXELS = 1 << 26  # of a result: 8192 x 8192
MOST_TIMES = 4
OVERLAP = 0.25
PASSES = 3  # of back-projection
LATENT_PASSES = 2  # of back-projection of the detail latent
PROJECTION = 2  # version of back-projection: 1 compared reductions beyond [-1,1]


def upscale(
    pipe: Any,
    images: Image.Image | Sequence[Image.Image],
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    strength: float = 0.0,
    steps: int = 30,
    guidance_scale: float = 2.5,
    seed: int = 0,
    times: int = 1,
    batch_size: int = 4,
    window: int | None = None,
    overlap: float = OVERLAP,
    faithful: bool = True,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_base: OnBase | None = None,
) -> list[Image.Image]:
    """Enlarge images s times each way with an upgraded model, at the small image's tokens.

    The noise of an image depends on the seed and its pixels alone, not on the images around it or the batch size.

    Args:
        pipe: an upgraded pipeline of any family that `davae upgrade` trains, loaded by plain diffusers or by davae.
        images: of any size and shape, read by the rules for files (upright, sRGB, on white); larger ones than the model's
            own are drawn in overlapping windows.
        prompts: one for all, or one an image; classes by name or number for a class-conditional pipeline.
        strength: share of the steps, rounded down, in which the base may change too, in [0,1]; 0 keeps it.
        times: how often the result is enlarged again; 2 gives s^2.
        batch_size: windows that the model sees at a time.
        window: side of the windows in pixels of the result; by default the size that the model draws.
        overlap: share of its side that a window has in common with the next one.
        faithful: begin with a bicubic enlargement's detail, and bring the result back to its input; only if no step is free.
        on_step: called with the steps that are done and their number, over all images.
        on_base: called after each step of a group of images with its number and estimates of their clean base latents
            (1,C,h,w), normalised; the image may be mirrored at its right and lower edge.

    Returns:
        One image for each of `images`, upright, RGB.

    Raises:
        ModelError: no upgraded pipeline, an argument out of bounds, an unreadable image, a result too large or not finite.
    """
    check_enlarging(pipe, strength=strength, steps=steps, times=times, batch_size=batch_size, overlap=overlap)
    project = is_projected(steps, strength, faithful)
    work = _Work(pipe, _window(pipe, window), overlap, operator.index(seed), project)
    results = _sources(pipe, images, times, window)
    texts = _prompts(pipe, prompts, len(results))
    if not denoiser(pipe).config.get(CLEAN_BASE):
        _note_noisy_base()
    options = {"strength": strength, "steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
    numbers = [zlib.crc32(image.tobytes()) for image in results]  # a rounding of a first result changes no noise
    total, before = steps * times * len(results), 0
    for done in range(times):
        for chosen in _groups([len(work.grid(image.size)) for image in results], batch_size):
            shown = counted(on_step, before, steps * len(chosen), total)
            group = [results[i] for i in chosen], [texts[i] for i in chosen], [numbers[i] + done for i in chosen]
            for i, image in zip(chosen, work.enlarge(*group, on_step=shown, on_base=on_base, **options), strict=True):
                results[i] = image
            before += steps * len(chosen)
    return results


def is_projected(steps: int, strength: float, faithful: bool) -> bool:
    """Return whether results are brought back to their inputs: where no step is free."""
    return faithful and not free_steps(steps, strength)


@lru_cache(1)
def _note_noisy_base() -> None:
    """Note once that a model was not trained for enlarging."""
    logger.info("this model can enlarge; one trained with stage2.clean_base sees the base without noise at each step")


def window_count(pipe: Any, size: tuple[int, int]) -> int:
    """Return the number of windows of an image of (width, height) pixels.

    Args:
        pipe: an upgraded pipeline.
        size: width and height of the image.
    """
    return len(_Work(pipe, _window(pipe, None), OVERLAP, 0, False).grid(size))


def counted(on_step: Callable[[int, int], None], before: int, own: int, total: int) -> Callable[[int, int], None]:
    """Return a function of a group's steps that counts them as `own` of all images' `total`."""
    return lambda done, of: on_step(before + own * done // of, total)


class _Work:
    """Enlarging of groups of images, one pass for each call of `enlarge`.

    Args:
        side: of a window, in latent positions.
        project: whether results are brought back to their inputs.
    """

    def __init__(self, pipe: Any, side: int, overlap: float, seed: int, project: bool):
        self.pipe, self.side, self.overlap, self.seed, self.project = pipe, side, overlap, seed, project
        self.vae: DetailVAE = pipe.vae
        self.factor = self.vae.spatial_factor // self.vae.layout.scale  # pixels of the input per latent position
        model = denoiser(pipe)
        self.grain = token_side(pipe) // pixel_factor(pipe) * family_of(model).grid
        self.grain = math.lcm(self.grain, self.vae.mean.shape[-1])

    def grid(self, size: tuple[int, int]) -> WindowGrid:
        """Return the windows over an image of (width, height) pixels."""
        width, height = (max(self.side, -(-n // (self.factor * self.grain)) * self.grain) for n in size)
        return WindowGrid.over(height, width, self.side, self.overlap, self.grain)

    def enlarge(
        self, images: list[Image.Image], prompts: list[str], numbers: list[int], **options: Any
    ) -> list[Image.Image]:
        """Enlarge images once, each with the noise of its number."""
        inputs = [to_tensor(image)[None] for image in images]  # (1,3,H,W)
        work = []
        for image, pixels, prompt, number in zip(images, inputs, prompts, numbers, strict=True):
            grid = self.grid(image.size)
            noise = structured_noise(self.seed, number, self.vae.layout, grid.height, grid.width)
            generator = seeded_generator(number ^ self.seed)
            draft = self._draft(pixels, grid) if self.project else None
            work.append(Enlargement(self._encode(pixels, grid), noise, grid, prompt, generator, draft))
        latents = draw_detail(self.pipe, work, **options)
        return [self._decode(z_hr, source) for z_hr, source in zip(latents, inputs, strict=True)]

    def _encode(self, pixels: Tensor, grid: WindowGrid) -> Tensor:
        """Encode (1,3,H,W) into z (1,C,h,w), mirrored at right and below to fill the grid."""
        padded = self._padded(pixels, grid.height, grid.width)
        with self._tiled(padded.shape[-2:], self.vae.layout.scale):
            return in_range(self.vae, self.vae.encode_base, padded)

    @torch.no_grad()
    def _draft(self, pixels: Tensor, grid: WindowGrid) -> Tensor:
        """Return the normalised detail (1,D,h,w) of a bicubic enlargement, corrected by its input."""
        padded, scale = self._padded(pixels, grid.height, grid.width), self.vae.layout.scale
        enlarged = F.interpolate(padded, scale_factor=scale, mode="bicubic", align_corners=False)
        with self._tiled(padded.shape[-2:], scale):
            latents = encode_in_range(self.vae, back_projected(enlarged, padded, scale))
        return self.vae.layout.split(latents)[1]

    def _padded(self, pixels: Tensor, h: int, w: int) -> Tensor:
        """Return (1,3,H,W), mirrored at right and below to fill h x w latent positions."""
        height, width = h * self.factor - pixels.shape[-2], w * self.factor - pixels.shape[-1]
        return torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, 0), (0, height), (0, width)), mode="symmetric"))

    @torch.no_grad()
    def _decode(self, latents: Tensor, source: Tensor) -> Image.Image:
        """Decode z_hr (1,C+D,h,w) into an image s times the size of its source (1,3,H,W)."""
        scale = self.vae.layout.scale
        height, width = source.shape[-2] * scale, source.shape[-1] * scale
        with self._tiled((latents.shape[-2] * self.factor, latents.shape[-1] * self.factor), scale):
            for _ in range(LATENT_PASSES * self.project):
                latents = back_projected_detail(self.vae, latents, self._padded(source, *latents.shape[-2:]))
            decoded = decode_in_range(self.vae, latents)  # (1,3,H,W)
        pixels = decoded[..., :height, :width].float().cpu()
        if not all(finite_images(pixels)):
            raise ModelError(f"enlarged image: NaN or infinite values; {remedy(self.vae.dtype)}")
        if self.project:
            pixels = back_projected(pixels, source, scale)
        return to_images(pixels)[0]

    @contextmanager
    def _tiled(self, size: Sequence[int], scale: int) -> Iterator[None]:
        """Let the autoencoder work in strips or tiles inside the block for a large image."""
        vae, before = self.vae, (self.vae.use_tiling, self.vae.tiling)
        side = max(TILE, vae.tiling.tile)
        if size[0] * size[1] * scale**2 > side**2 and not vae.use_tiling:
            vae.enable_tiling(side)
        try:
            yield
        finally:
            vae.use_tiling, vae.tiling = before


def back_projected(images: Tensor, source: Tensor, scale: int, passes: int = PASSES) -> Tensor:
    """Bring images back to the source that they were enlarged from.

    x <- clamp(x + up(source - clamp(down(x)))), as iterative back-projection (Irani and Peleg, 1991); `down` is bicubic
    with antialiasing, `up` bicubic: only what the source shows is changed. Next to edges down(x) leaves [-1,1], which a
    source of pixels cannot; without the inner clamp a perfect enlargement would be changed there.

    Args:
        images: (B,3,sH,sW) in [-1,1].
        source: (B,3,H,W).
        scale: s.
        passes: corrections.
    """
    images = images.clamp(-1, 1)
    for _ in range(passes):
        missing = source - downsample(images, scale).clamp(-1, 1)  # (B,3,H,W)
        raised = F.interpolate(missing, images.shape[-2:], mode="bicubic", align_corners=False)
        images = (images + raised).clamp(-1, 1)
    return images


@torch.no_grad()
def back_projected_detail(vae: DetailVAE, latents: Tensor, source: Tensor) -> Tensor:
    """Return latents whose detail draws an image nearer to the source.

    z_d <- z_d + E_d(x') - E_d(x), where x is the decoded image and x' is x after back-projection: edges move with what the
    source shows of them. What encoding loses is lost in both, so it stays in z_d.

    Args:
        vae: the autoencoder.
        latents: normalised z_hr (B,C+D,h,w).
        source: (B,3,H,W) in [-1,1].
    """
    image = decode_in_range(vae, latents).float().cpu().clamp(-1, 1)  # (B,3,sH,sW)
    projected = back_projected(image, source, vae.layout.scale)
    before, after = (vae.denormalise(encode_in_range(vae, x).to(latents)) for x in (image, projected))
    z, z_d = vae.layout.split(vae.denormalise(latents))
    return vae.normalise(vae.layout.join(z, z_d + vae.layout.split(after - before)[1]))


def check_enlarging(
    pipe: Any, *, strength: float, steps: int, times: int, batch_size: int, overlap: float = OVERLAP
) -> None:
    """Refuse arguments that `upscale` cannot follow.

    Args:
        pipe: the pipeline.
        strength, steps, times, batch_size, overlap: arguments of `upscale`.

    Raises:
        ModelError: in one line, what was found and what to do.
    """
    if not isinstance(getattr(pipe, "vae", None), DetailVAE):
        raise ModelError(f"a {type(pipe).__name__} without a DetailVAE cannot enlarge; use an upgraded model")
    for name, value, low, high in (
        ("strength", strength, 0.0, 1.0),
        ("steps", steps, 1, 10_000),
        ("times", times, 1, MOST_TIMES),
        ("batch_size", batch_size, 1, 65_536),
        ("overlap", overlap, 0.0, 0.75),
    ):
        if not low <= value <= high:
            raise ModelError(f"{name}: found {value}; use a number from {low} to {high}")


def check_size(pipe: Any, size: tuple[int, int], times: int, name: str, window: int | None = None) -> None:
    """Refuse an image whose result, or what it is drawn on, is larger than davae makes.

    Args:
        pipe: an upgraded pipeline.
        size: width and height in pixels.
        times: how often it is enlarged.
        name: of the image, for the message.
        window: side of the windows in pixels, which every side that is drawn has at least; by default the size that the model
            draws.

    Raises:
        ModelError: an image without pixels, or a result that is too large.
    """
    if min(size) < 1:
        raise ModelError(f"{name}: {size[0]}x{size[1]} pixels; there is nothing to enlarge")
    scale, least = pipe.vae.layout.scale**times, window or default_resolution(pipe)
    width, height = size[0] * scale, size[1] * scale
    drawn = max(width, least), max(height, least)
    if drawn[0] * drawn[1] > max(MOST_PIXELS, least**2):
        on = "" if drawn == (width, height) else f", drawn on {drawn[0]}x{drawn[1]}"
        raise ModelError(
            f"{name}: {size[0]}x{size[1]} pixels would become {width}x{height}{on}, more than {MOST_PIXELS} pixels; "
            "reduce or cut it first, or enlarge fewer times"
        )


def _sources(
    pipe: Any, images: Image.Image | Sequence[Image.Image], times: int, window: int | None
) -> list[Image.Image]:
    """Return the images upright and in sRGB, all of them of sizes that can be enlarged."""
    sources = []
    for number, image in enumerate([images] if isinstance(images, Image.Image) else images):
        check_size(pipe, image.size, times, f"image {number}", window)
        try:
            sources.append(converted_image(image))
        except UnreadableImage as error:
            raise ModelError(f"image {number}: {fault_of_one(error)}") from error
    return sources


def _prompts(pipe: Any, prompts: Prompt | Sequence[Prompt] | None, count: int) -> list[str]:
    if prompts is None and goes_by_class(pipe):
        raise ModelError("prompts: none found; a class-conditional model needs a class for each image")
    one = isinstance(prompts, str) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0
    given: Any = ["" if prompts is None else prompts] * count if one else prompts
    texts = [prompt if isinstance(prompt, str) else str(operator.index(prompt)) for prompt in given]
    if len(texts) != count:
        raise ModelError(f"prompts: found {len(texts)} for {count} images; give one for all, or one an image")
    check_class_prompts(pipe, texts)
    return texts


def _window(pipe: Any, pixels: int | None) -> int:
    """Return the side of a window in latent positions."""
    size, step = pixels or default_resolution(pipe), token_side(pipe)
    step *= family_of(pipe).grid
    if size % step:
        raise ModelError(
            f"window: {size} pixels are not divisible by {step}; use {max(1, round(size / step)) * step}"
        )
    check_drawable(pipe, size, size)
    return size // pixel_factor(pipe)


def _groups(windows: list[int], batch_size: int) -> list[list[int]]:
    """Return groups of images with at most `batch_size` windows, or of one larger image."""
    groups: list[list[int]] = []
    held = batch_size
    for number, count in enumerate(windows):
        if held + count > batch_size:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += count
    return groups
