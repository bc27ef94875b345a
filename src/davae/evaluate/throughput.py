"""Tokens and time of one image, the transformer's passes and the whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from davae.backbones.families import denoiser
from davae.dataset.look import real_pictures
from davae.evaluate.generation import condition_of
from davae.evaluate.upscale import Upscaler, make_upscaler
from davae.pretrained.shapes import default_resolution, token_side
from davae.recipes.sections import Data
from davae.sample.call import call_pipeline
from davae.sample.open import open_model


@dataclass(frozen=True)
class Timing:
    """Median seconds of one image over repeats, and the transformer's image tokens."""

    name: str
    tokens: int
    transformer: float
    whole: float


def image_tokens(pipeline: Any, resolution: int) -> int:
    """Return the image tokens of a square image.

    Args:
        pipeline: the pipeline.
        resolution: pixels of the image's side.
    """
    return (resolution // token_side(pipeline)) ** 2


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Stopwatch:
    """Sum of the time that a module spends in its forward passes."""

    def __init__(self, module: torch.nn.Module):
        self.seconds, self._started = 0.0, 0.0
        self._handles = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]

    def _start(self, *_: Any) -> None:
        synchronise()
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._started

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def time_pipelines(
    candidates: list[tuple[str, Any, int, Callable[[Any], Any]]],
    prompt: str,
    *,
    steps: int,
    guidance_scale: float,
    repeats: int,
    turn: Callable[[Any], Any] = lambda pipeline: pipeline,
) -> list[Timing]:
    """Measure the median time of one image by each pipeline, one image of each a round.

    One warm-up each, then `repeats` rounds in which every candidate runs once. `turn` brings a pipeline to its device first,
    untimed.

    Args:
        candidates: name, pipeline, resolution and a function that finishes the image, for each way.
        prompt: the prompt of all images.
        steps, guidance_scale: as a pipeline takes them.
        repeats: timed rounds.
        turn: brings a pipeline to its device, untimed.
    """
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in candidates}
    for number in range(repeats + 1):
        for name, pipeline, resolution, finish in candidates:
            turn(pipeline)
            watch = _Stopwatch(denoiser(pipeline))
            started = time.perf_counter()
            result = call_pipeline(
                pipeline,
                [prompt],
                resolution,
                steps=steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(number),
            )
            finish(result.images[0])
            whole = time.perf_counter() - started
            watch.remove()
            if number:
                rounds[name].append((watch.seconds, whole))
    return [
        Timing(name, image_tokens(pipeline, resolution), *map(statistics.median, zip(*rounds[name], strict=True)))
        for name, pipeline, resolution, _ in candidates
    ]


@dataclass(frozen=True)
class Candidate:
    """One way to an image, which is timed.

    Attributes:
        name: name of the way in the figures.
        pipeline: the model, by the names that `open_model` takes.
        resolution: pixels that it draws; None is its own size.
        compare_at: pixels to which the image is enlarged; None leaves it as drawn.
        upscale: enlarger, as `make_upscaler` takes it.
    """

    name: str
    pipeline: str
    resolution: int | None = None
    compare_at: int | None = None
    upscale: str = "bilinear"


def _enlarge_one(enlarge: Upscaler, prompt: str, image: Any) -> Any:
    return enlarge([image], [prompt])[0]


def time_pictures(
    candidates: Sequence[Candidate], data: str | Data, *, steps: int, guidance: float, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Measure tokens and median seconds of one image by each candidate, enlarging included.

    The candidates run alternately, so that a drift of the machine affects all of them.

    Args:
        candidates: the ways to compare.
        data: images whose first caption or class is drawn.
        steps: sampling steps.
        guidance: guidance scale.
        repeats: timed images of each candidate.

    Returns:
        For each name `tokens`, `seconds`, `transformer_seconds`, `images_per_second` and `repeats`.
    """
    entries: list[tuple[str, Any, int, Callable[[Any], Any]]] = []
    prompt = ""
    for candidate in candidates:
        model, _ = open_model(candidate.pipeline)
        size = candidate.resolution or default_resolution(model)
        final = candidate.compare_at or size
        enlarge = make_upscaler(candidate.upscale, final) if size != final else None
        prompt = prompt or condition_of(real_pictures(data, final, 0.0, "train"), 0, model)
        finish = partial(_enlarge_one, enlarge, prompt) if enlarge else lambda image: image
        entries.append((candidate.name, model, size, finish))
    timings = time_pipelines(entries, prompt, steps=steps, guidance_scale=guidance, repeats=repeats)
    return {
        timing.name: {
            "tokens": timing.tokens,
            "seconds": timing.whole,
            "transformer_seconds": timing.transformer,
            "images_per_second": 1 / timing.whole,
            "repeats": repeats,
        }
        for timing in timings
    }
