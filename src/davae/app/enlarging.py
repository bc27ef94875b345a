"""One image of a visitor, enlarged by the upgraded model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from davae.app.pair import LOCK, Pair, Stopped, watched
from davae.app.uploads import MAX_SECONDS
from davae.backbones.families.rows import denoiser
from davae.errors import ModelError
from davae.sample.upscale import upscale, window_count

MOST_WINDOWS = 256  # of one image: what a visitor may take of the machine


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
        """Return a line on what was done."""
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
) -> Enlarged:
    """Enlarge one image once.

    Args:
        pair: the models; the upgraded one enlarges.
        stop: ends it before the next pass of the model.

    Raises:
        ModelError: no upgraded model, an image of too many windows, a class that the model lacks, too long a time.
        Stopped: after `stop` was set.
    """
    pipeline = pair.upgraded
    if pipeline is None:
        raise ModelError(f"{pair.name} is a base model; open an upgraded one to enlarge images")
    windows = window_count(pipeline, image.size)
    if windows > MOST_WINDOWS:
        raise ModelError(
            f"the image has {image.width}x{image.height} pixels, {windows} windows of the model; the page takes up to "
            f"{MOST_WINDOWS}: use `davae upscale`, or a smaller image"
        )
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
                batch_size=8, on_step=on_step,
            )  # fmt: skip
        seconds = time.monotonic() - began
    return Enlarged(image.resize(after.size, Image.Resampling.BICUBIC), after, seconds, windows)
