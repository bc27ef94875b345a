"""One prompt drawn three ways from the same seed, with the tokens and time of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from davae.app.pair import LOCK, Pair, Stopped, watched
from davae.app.uploads import MAX_PROMPT, MAX_SECONDS, MAX_STEPS
from davae.backbones.classes import goes_by_class
from davae.backbones.families import denoiser
from davae.errors import ModelError
from davae.evaluate.throughput import image_tokens, synchronise
from davae.runs.crops import magnify_crop, most_different
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, check_class_prompts
from davae.sample.preview import Preview
from davae.vae.detail_vae import DetailVAE

ENLARGED, NATIVE, UPGRADED = WAYS = ("base, enlarged", "base, native", "upgraded")
PREVIEWS = 8  # of a drawing, at most

OnStep = Callable[[str, int, int], None]
OnPreview = Callable[[str, int, Image.Image], None]

_warm: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # transformer or U-Net -> resolutions that ran once


@dataclass(frozen=True)
class DrawnImage:
    """One image and its cost.

    Attributes:
        way: one of WAYS.
        image: at the pair's resolution.
        drawn_at: pixels that the model drew; the image may be enlarged.
        tokens: of the image, in the transformer.
        seconds: without the wait and the previews.
    """

    way: str
    image: Image.Image
    drawn_at: int
    tokens: int
    seconds: float

    @property
    def note(self) -> str:
        """Return the line below the image."""
        enlarged = "" if self.drawn_at == self.image.width else f", enlarged to {self.image.width}"
        return f"{self.drawn_at} px{enlarged} · {self.tokens} tokens · {self.seconds:.2f} s"


def ways_of(pair: Pair) -> list[str]:
    """Return the ways that a pair can draw."""
    return [way for way in WAYS if (pair.upgraded if way == UPGRADED else pair.base) is not None]


def draw(
    pair: Pair,
    prompt: str,
    ways: list[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    stop: threading.Event,
    on_step: OnStep = lambda way, done, steps: None,
    on_preview: OnPreview | None = None,
) -> Iterator[DrawnImage]:
    """Draw one image a way, from the same base noise, and give each as it is done.

    The first image of a model and size is preceded by one step that is not timed, so that times compare.

    Args:
        pair: the models.
        prompt: text, or a class by name or number.
        ways: some of WAYS.
        seed, steps, guidance: of every way.
        stop: ends the drawing before the next pass of the model.
        on_step: called with the way, the steps done and all steps.
        on_preview: called every few steps of the upgraded model with the way, the step and an image of its base.

    Raises:
        ModelError: an empty or overlong prompt, an unknown class, steps or guidance out of bounds, no way chosen.
        Stopped: after `stop` was set.
    """
    _check(pair, prompt, ways, steps, guidance, seed)
    left = float(MAX_SECONDS)
    for way in [way for way in WAYS if way in ways]:
        pipeline = pair.upgraded if way == UPGRADED else pair.base
        if pipeline is None:
            raise ModelError(f"{pair.name} is open without what draws '{way}'")
        size = pair.resolution // pair.scale if way == ENLARGED else pair.resolution
        network, watch = denoiser(pipeline), _Watch(way, steps, left, stop, on_step)
        preview = _preview(pipeline, way, steps, on_preview)
        with LOCK, watched(network, watch), _refusals(way):
            watch.began = time.monotonic()
            options = SamplingOptions(steps, guidance, seed, size)
            ran = _warm.setdefault(network, set())
            if size not in ran:
                generate(pipeline, [prompt], replace(options, steps=1))
                ran.add(size)
            started = time.perf_counter()
            image = generate(pipeline, [prompt], options, preview=preview)[0]
            if size != pair.resolution:
                image = image.resize((pair.resolution,) * 2, Image.Resampling.BICUBIC)
            seconds = time.perf_counter() - started - (preview.seconds if preview else 0.0)
            left -= time.monotonic() - watch.began
        yield DrawnImage(way, image, size, image_tokens(pipeline, size), seconds)


class _Watch:
    """Check before each pass of a model that ends a stopped or overlong drawing."""

    def __init__(self, way: str, steps: int, left: float, stop: threading.Event, on_step: OnStep):
        self.way, self.steps, self.left, self.stop, self.on_step = way, steps, left, stop, on_step
        self.began = time.monotonic()

    def __call__(self, done: int) -> None:
        if self.stop.is_set():
            raise Stopped
        if time.monotonic() - self.began > self.left:
            raise ModelError(f"a drawing may take {MAX_SECONDS} seconds; use fewer steps, or draw fewer ways")
        self.on_step(self.way, min(done, self.steps), self.steps)


class TimedPreview(Preview):
    """Previews whose time is kept apart from the drawing's.

    A scheduler of unknown noise levels ends the previews, not the drawing.

    Attributes:
        seconds: that all previews took.
    """

    seconds = 0.0

    def __call__(self, pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Look at the latents after a step, as `Preview` does."""
        if (step + 1) % self.every:
            return super().__call__(pipeline, step, timestep, kwargs)
        synchronise()  # so that the steps before are not counted
        began = time.perf_counter()
        try:
            return super().__call__(pipeline, step, timestep, kwargs)
        except ModelError:
            self.every = MAX_STEPS + 1
            return kwargs
        finally:
            self.seconds += time.perf_counter() - began


def preview_interval(steps: int) -> int:
    """Return the steps between two previews: at least two, and at most PREVIEWS in a drawing."""
    return max(2, -(-steps // PREVIEWS))


def _preview(pipeline: Any, way: str, steps: int, on_preview: OnPreview | None) -> TimedPreview | None:
    if on_preview is None or not isinstance(pipeline.vae, DetailVAE):
        return None

    def show(step: int, images: list[Image.Image]) -> None:
        if step < steps:  # the last step's image follows
            on_preview(way, step, images[0])

    return TimedPreview(pipeline, preview_interval(steps), on_preview=show)


@contextmanager
def _refusals(way: str) -> Iterator[None]:
    """Raise a pipeline's refusal of a size that it cannot draw as a ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{way}: {error}") from error


def _check(pair: Pair, prompt: str, ways: list[str], steps: int, guidance: float, seed: int) -> None:
    if not prompt.strip():
        needed = "a class" if goes_by_class(pair.any) else "a prompt"
        raise ModelError(f"the model needs {needed}; write one")
    if len(prompt) > MAX_PROMPT:
        raise ModelError(f"the prompt has {len(prompt)} characters; the page takes up to {MAX_PROMPT}")
    if not 1 <= steps <= MAX_STEPS:
        raise ModelError(f"steps is {steps}; the page takes 1 to {MAX_STEPS}")
    if not 0 <= guidance <= 30:
        raise ModelError(f"guidance is {guidance}; the page takes 0 to 30")
    if not 0 <= seed < 2**31:
        raise ModelError(f"seed is {seed}; the page takes 0 to {2**31 - 1}")
    if not ways:
        raise ModelError("nothing to draw; choose at least one of the ways")
    if not set(ways) <= set(WAYS):
        raise ModelError(f"an unknown way to draw; use {', '.join(WAYS)}")
    check_class_prompts(pair.any, [prompt])


class ExampleDrawing:
    """Drawing that a page shows before its visitor draws, made on the first visit and kept.

    Args:
        pair: the models.
        prompt: to draw.
    """

    STEPS, SECONDS = 16, 30.0  # a model that takes longer shows none

    def __init__(self, pair: Pair, prompt: str):
        self.pair, self.prompt = pair, prompt
        self._lock = threading.Lock()
        self._visits: set[threading.Event] = set()  # the end of each visit's drawing
        self._slow = False
        self._drawn: list[DrawnImage] = []

    def images(self, guidance: float) -> list[DrawnImage]:
        """Return the images, none where a visitor's own drawing came first or the model is slow.

        Args:
            guidance: scale of the guidance.

        Raises:
            ModelError: the model cannot draw them.
        """
        stop = threading.Event()
        self._visits.add(stop)
        try:
            with self._lock:
                if not (self._drawn or self._slow or stop.is_set()):
                    self._drawn = self._draw(guidance, stop)
                return self._drawn
        except Stopped:
            return []
        finally:
            self._visits.discard(stop)

    def _draw(self, guidance: float, stop: threading.Event) -> list[DrawnImage]:
        left, before = self.SECONDS, 0.0

        def bound(way: str, done: int, steps: int) -> None:
            nonlocal left, before
            now = time.monotonic()
            left -= now - before if done else 0.0  # the wait for the model before a way's first pass is not counted
            before = now
            if left < 0:
                self._slow = True
                stop.set()

        options = {"seed": 0, "steps": self.STEPS, "guidance": guidance, "stop": stop, "on_step": bound}
        return list(draw(self.pair, self.prompt, [way for way in ways_of(self.pair) if way != NATIVE], **options))

    def give_way(self) -> None:
        """End the drawings of all visits so far, so that a visitor does not wait for them."""
        for stop in list(self._visits):
            stop.set()


def most_different_place(first: Image.Image, second: Image.Image, zoom: int) -> tuple[float, float]:
    """Find where two images differ most.

    Args:
        first, second: of the same size.
        zoom: the place is a square 1/zoom as wide as the images.

    Returns:
        Its centre (x, y), as shares of the sides in [0,1].
    """
    side = max(1, first.width // zoom)
    left, top = most_different(first, second, side)
    return (left + side / 2) / first.width, (top + side / 2) / first.height


def cut_place(image: Image.Image, x: float, y: float, zoom: int) -> Image.Image:
    """Return the part of an image around (x, y), enlarged without smoothing.

    Args:
        image: to cut from.
        x, y: centre, as shares of the sides in [0,1].
        zoom: the part is 1/zoom as wide as the image, and enlarged `zoom` times.
    """
    side = max(1, image.width // zoom)
    left = int(np.clip(round(x * image.width - side / 2), 0, image.width - side))
    top = int(np.clip(round(y * image.height - side / 2), 0, image.height - side))
    return magnify_crop(image, left, top, side, zoom)
