"""Previews while a pipeline draws, decoded from the base channels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from davae.backbones.packed_latents import latent_size, unpack_latents
from davae.data.images import to_images
from davae.errors import ModelError
from davae.sample.levels import clean_of, first_step
from davae.vae.base_decoder import linear_decoder
from davae.vae.detail_vae import DetailVAE

OnPreview = Callable[[int, list[Image.Image]], None]


class Preview:
    """Images of the base, decoded every few steps of a pipeline's call.

    It is a callback of stock pipelines, or a context around a call.

    `pipe(prompt, callback_on_step_end=davae.preview(pipe, every=5))`. Pipelines that take no callback draw in a block:
    `with davae.preview(pipe) as shown: pipe(prompt)`.

    Attributes:
        images: number of the step, counted from 1 -> its images; those of the drawing that runs, or ran last.

    Args:
        pipeline: a pipeline with a DetailVAE.
        every: steps between two previews.
        decoder: `auto` takes the base decoder of the DetailVAE where it has one, else `linear`; `linear`, a convolution that
            is fitted in seconds and costs nearly nothing; `base`; or a module from raw base latents (B,C,h,w) to images
            (B,3,H,W) in [-1,1].
        on_preview: called with the step's number and the images.
        height, width: pixels that the pipeline draws; needed for other shapes than squares where it packs latents as tokens.

    Raises:
        ModelError: no DetailVAE, no base decoder for `base`, or an unknown decoder.
    """

    def __init__(
        self,
        pipeline: Any,
        every: int = 5,
        *,
        decoder: Any = "auto",
        on_preview: OnPreview | None = None,
        height: int | None = None,
        width: int | None = None,
    ):
        if not isinstance(getattr(pipeline, "vae", None), DetailVAE):
            raise ModelError(
                f"a {type(pipeline).__name__} without a DetailVAE has no base to preview; use an upgraded model"
            )
        if every < 1:
            raise ModelError(f"every: found {every}; use 1 or more steps")
        self.pipeline, self.every, self.on_preview = pipeline, every, on_preview
        self.decode = _decoder(pipeline.vae, decoder)
        factor = pipeline.vae.spatial_factor
        self._size = None if height is None or width is None else (height // factor, width // factor)
        self._before: Tensor | None = None
        self._left_out = 0
        self.images: dict[int, list[Image.Image]] = {}

    @torch.no_grad()
    def __call__(self, pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decode the latents after a step, unchanged, as `callback_on_step_end`.

        Args:
            pipeline: the one that draws.
            step: counted from 0.
            timestep: the scheduler's.
            kwargs: with `latents`.

        Returns:
            `kwargs`.
        """
        if step == 0:
            self.images, self._before = {}, None
            self._left_out = first_step(pipeline.scheduler, timestep)
        latents, number = kwargs["latents"], step + 1
        if number % self.every == 0:
            shown = self.images[number] = self._show(pipeline, latents, number)
            if self.on_preview is not None:
                self.on_preview(number, shown)
        self._before = latents if (number + 1) % self.every == 0 else None
        return kwargs

    def _show(self, pipeline: Any, latents: Tensor, number: int) -> list[Image.Image]:
        clean = clean_of(pipeline, latents, self._left_out + number, self._before)
        height, width = latent_size(clean, self.pipeline.vae.layout.channels, self._size)
        pixels = self.decode(unpack_latents(clean, height, width))  # (B,3,H,W)
        return to_images(pixels.float().clamp(-1, 1))

    def __enter__(self) -> Preview:
        """Watch the scheduler that the pipeline has now: its steps are then those of the preview."""
        scheduler = self.pipeline.scheduler
        if scheduler is None:
            raise ModelError(f"a {type(self.pipeline).__name__} takes this preview as callback_on_step_end")
        step, outer, timesteps, done = scheduler.step, vars(scheduler).get("step"), None, 0

        @functools.wraps(step)  # pipelines look at its signature for `generator` and `eta`
        def watched(model_output: Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
            nonlocal timesteps, done
            result = step(model_output, timestep, *args, **options)
            if timesteps is not scheduler.timesteps:  # every drawing sets its own
                timesteps, done = scheduler.timesteps, 0
            self(self.pipeline, done, timestep, {"latents": _once(result[0])})
            done += 1
            return result

        scheduler.step = watched
        drop = functools.partial(delattr, scheduler, "step")
        self._leave = drop if outer is None else functools.partial(setattr, scheduler, "step", outer)
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()


def preview(pipeline: Any, every: int = 5, **options: Any) -> Preview:
    """Return a `callback_on_step_end` that keeps previews of the base in `.images`.

    Args:
        pipeline: a pipeline with a DetailVAE, loaded by plain diffusers or by davae.
        every: steps between two previews.
        options: `Preview`'s other arguments.

    Raises:
        ModelError: the pipeline has no DetailVAE.
    """
    return Preview(pipeline, every, **options)


def takes_callback(pipeline: Any) -> bool:
    """Return whether a pipeline calls `callback_on_step_end`."""
    return "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters


@contextmanager
def watching(pipeline: Any, preview: Preview | None) -> Iterator[Preview | None]:
    """Yield the callback for a call, None where the scheduler is watched or nothing is shown."""
    if preview is None or takes_callback(pipeline):
        yield preview
        return
    preview.pipeline = pipeline  # whose scheduler may be another one
    with preview:
        yield None


def _decoder(vae: DetailVAE, choice: Any) -> Callable[[Tensor], Tensor]:
    """Return what decodes normalised latents (B,C+D,h,w) into images of the base."""
    if choice == "base" and vae.base_decoder is None:
        raise ModelError(
            "preview decoder: this model has no base decoder; export it with --base-decoder, or use linear"
        )
    if choice in ("auto", "base") and vae.base_decoder is not None:
        return lambda latents: vae.decode_base(latents.to(vae.dtype))
    if choice in ("auto", "linear"):
        return lambda latents: linear_decoder(vae)(vae.base_latents(latents).float().cpu())
    if callable(choice):
        module: Callable[..., Any] = choice
        return lambda latents: module(vae.base_latents(latents))
    raise ModelError(f"preview decoder: {choice!r}; use auto, linear, base or a module")


def _once(latents: Tensor) -> Tensor:
    """Return the latents of a step without the second half of guidance that DiT's carries."""
    half = len(latents) // 2
    return latents[:half] if half and torch.equal(latents[:half], latents[half:]) else latents
