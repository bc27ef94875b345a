"""One image of a visitor, enlarged by the upgraded model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from davae.app.drawing import preview_interval
from davae.app.pair import LOCK, Pair, Stopped, watched
from davae.app.uploads import MAX_SECONDS
from davae.backbones.families import denoiser
from davae.data.images import to_images
from davae.errors import ModelError
from davae.sample.draw_detail import OnBase
from davae.sample.preview import Preview
from davae.sample.upscale import upscale, window_count

MOST_WINDOWS = 256  # of one image: what a visitor may take of the machine


OnPreview = Callable[[Image.Image, Image.Image], None]


@dataclass(frozen=True)
class Enlarged:
    """An enlarged image.

    Attributes:
        before: the input, enlarged by bicubic interpolation.
        after: the result.
        seconds: without the wait.
        windows: that the model drew.
    """

    before: Image.Image
    after: Image.Image
    seconds: float
    windows: int

    @property
    def note(self) -> str:
        """Return a line on the size, the windows and the time."""
        width, height = self.after.size
        return (
            f"{width}x{height} pixels from {self.windows} window{'s' * (self.windows != 1)} in {self.seconds:.1f} s."
        )


def enlarge_image(
    pair: Pair,
    image: Image.Image,
    prompt: str,
    *,
    strength: float,
    steps: int,
    guidance: float,
    seed: int,
    stop: threading.Event,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_preview: OnPreview | None = None,
) -> Enlarged:
    """Enlarge one image once.

    Args:
        pair: the models; the upgraded one enlarges.
        image: of any size.
        prompt: text, or a class by name or number.
        strength: share of the steps that may change the image itself, in [0,1].
        steps, guidance, seed: of the drawing.
        stop: ends the drawing before the next pass of the model.
        on_step: called with the steps done and all steps.
        on_preview: called with bicubic enlargement and a preview: first the former twice, then every few of the steps that
            may change the image with what the image has become, without the detail.

    Raises:
        ModelError: no upgraded model, an image of too many windows, an unknown class, too long a time.
        Stopped: after `stop` was set.
    """
    pipeline = pair.upgraded
    if pipeline is None:
        raise ModelError(f"{pair.name} is a base model; open an upgraded one to enlarge images")
    _check_windows(window_count(pipeline, image.size), image)
    before = image.resize((image.width * pair.scale, image.height * pair.scale), Image.Resampling.BICUBIC)
    with LOCK:
        began = time.monotonic()

        def before_pass(done: int) -> None:
            if stop.is_set():
                raise Stopped
            if time.monotonic() - began > MAX_SECONDS:
                raise ModelError(f"enlarging may take {MAX_SECONDS} seconds; use fewer steps, or a smaller image")

        with watched(denoiser(pipeline), before_pass):
            (after,) = upscale(
                pipeline, image, [prompt], strength=strength, steps=steps, guidance_scale=guidance, seed=seed,
                batch_size=8, on_step=on_step, on_base=_previews(pipeline, image, before, strength, steps, on_preview),
            )  # fmt: skip
        seconds = time.monotonic() - began
    return Enlarged(before, after, seconds, window_count(pipeline, image.size))


def _check_windows(windows: int, image: Image.Image) -> None:
    if windows > MOST_WINDOWS:
        raise ModelError(
            f"the image has {image.width}x{image.height} pixels, {windows} windows of the model; the page takes up to "
            f"{MOST_WINDOWS}: use `davae upscale`, or a smaller image"
        )


def _previews(
    pipeline: Any, image: Image.Image, before: Image.Image, strength: float, steps: int, on_preview: OnPreview | None
) -> OnBase | None:
    """Return the function that decodes the base while it may change, by a linear estimate.

    Its cost is next to nothing at any size.
    """
    if on_preview is None:
        return None
    on_preview(before, before)
    every, free = preview_interval(steps), int(steps * strength + 1e-9)
    decode, layout = Preview(pipeline, decoder="linear").decode, pipeline.vae.layout

    def show(step: int, bases: list[Tensor]) -> None:
        if step % every or not steps - free < step < steps:
            return
        z = bases[0]
        latents = layout.join(z, z.new_zeros(1, layout.detail_channels, *z.shape[-2:]))
        drawn = to_images(decode(latents)[..., : image.height, : image.width])[0]
        on_preview(before, drawn.resize(before.size, Image.Resampling.BICUBIC))

    return show
