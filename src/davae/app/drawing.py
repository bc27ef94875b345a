"""The same seed drawn three ways: base enlarged, base native, upgraded; each with its tokens and its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from davae.app.pair import LOCK, Pair, Stopped, watched
from davae.app.uploads import MAX_PROMPT, MAX_SECONDS, MAX_STEPS
from davae.backbones.families.rows import denoiser
from davae.errors import ModelError
from davae.evaluate.throughput import image_tokens
from davae.runs.crops import enlarged, most_different
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.sample.generate import generate
from davae.sample.open import check_classes

ENLARGED, NATIVE, UPGRADED = WAYS = ("base, enlarged", "base, native", "upgraded")

_warm: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # transformer or U-Net -> resolutions that ran once


@dataclass(frozen=True)
class DrawnImage:
    """One picture, and what it cost."""

    way: str
    picture: Image.Image
    drawn_at: int  # pixels that the model drew; the picture may be enlarged
    tokens: int
    seconds: float

    @property
    def note(self) -> str:
        """For the line below the picture."""
        enlarged = "" if self.drawn_at == self.picture.width else f", enlarged to {self.picture.width}"
        return f"{self.drawn_at} px{enlarged} · {self.tokens} tokens · {self.seconds:.2f} s"


def ways_of(pair: Pair) -> list[str]:
    """The ways that a pair can draw."""
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
    on_step: Callable[[str, int, int], None] = lambda way, done, steps: None,
) -> Iterator[DrawnImage]:
    """One picture a way, from the same base noise, as each is done.

    The first picture of a model and size is preceded by one step that is not timed, so that times compare.

    Raises:
        ModelError: an empty or overlong prompt, a class the model lacks, steps or guidance out of bounds, no way asked for.
        Stopped: after `stop` was set.
    """
    _check(pair, prompt, ways, steps, guidance, seed)
    left = float(MAX_SECONDS)
    for way in [way for way in WAYS if way in ways]:
        pipeline = pair.upgraded if way == UPGRADED else pair.base
        if pipeline is None:
            raise ModelError(f"{pair.name} is open without what draws '{way}'")
        size = pair.resolution // pair.scale if way == ENLARGED else pair.resolution
        began = time.monotonic()

        def before_pass(done: int, way: str = way) -> None:
            if stop.is_set():
                raise Stopped
            if time.monotonic() - began > left:  # noqa: B023 - called before the next way begins
                raise ModelError(f"a drawing may take {MAX_SECONDS} seconds; use fewer steps, or draw fewer ways")
            on_step(way, min(done, steps), steps)

        network = denoiser(pipeline)
        with LOCK, watched(network, before_pass), _refusals(way):
            began = time.monotonic()
            options = {"resolution": size, "guidance_scale": guidance, "seed": seed}
            ran = _warm.setdefault(network, set())
            if size not in ran:
                generate(pipeline, [prompt], steps=1, **options)
                ran.add(size)
            started = time.perf_counter()
            picture = generate(pipeline, [prompt], steps=steps, **options)[0]
            if size != pair.resolution:
                picture = picture.resize((pair.resolution,) * 2, Image.Resampling.BICUBIC)
            seconds = time.perf_counter() - started
            left -= time.monotonic() - began
        yield DrawnImage(way, picture, size, image_tokens(pipeline, size), seconds)


@contextmanager
def _refusals(way: str) -> Iterator[None]:
    """Raise a pipeline's refusal of a size that it cannot draw as a ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{way}: {error}") from error


def _check(pair: Pair, prompt: str, ways: list[str], steps: int, guidance: float, seed: int) -> None:
    if not prompt.strip():
        wanted = "a class" if isinstance(pair.any, ClassConditionalPipeline) else "a prompt"
        raise ModelError(f"the model needs {wanted}; write one")
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
    check_classes(pair.any, [prompt])


def place(first: Image.Image, second: Image.Image, zoom: int) -> tuple[float, float]:
    """Where two pictures differ most: centre of the square that is 1/zoom as wide, shares of the sides in [0,1]."""
    side = max(1, first.width // zoom)
    left, top = most_different(first, second, side)
    return (left + side / 2) / first.width, (top + side / 2) / first.height


def cut(picture: Image.Image, x: float, y: float, zoom: int) -> Image.Image:
    """The part of a picture around (x, y), shares of its sides in [0,1], enlarged `zoom` times without smoothing."""
    side = max(1, picture.width // zoom)
    left = int(np.clip(round(x * picture.width - side / 2), 0, picture.width - side))
    top = int(np.clip(round(y * picture.height - side / 2), 0, picture.height - side))
    return enlarged(picture, left, top, side, zoom)
