"""Samples that are measured: drawn, or read from an earlier evaluation of the same model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from davae.data.decoding import read_image
from davae.data.images import to_tensor
from davae.data.latent_cache.key import hash_values
from davae.errors import RunError
from davae.evaluate.upscale import Upscaler
from davae.files.atomic import atomic_file
from davae.files.outputs import is_drawn
from davae.files.ownership import check_no_part
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, model_places
from davae.sample.resume import kept_images


def check_keep(keep: Path | None, pipeline: str, source: str) -> None:
    """Refuse a folder for samples and measurements that is not free to take them.

    Args:
        keep: the folder; None keeps nothing.
        pipeline: name of the model; files inside its folder would change its fingerprint.
        source: of the real images, among which samples would be taken for real ones.

    Raises:
        RunError: a file, a part of a run, or a place inside the model's or the data's folder.
    """
    if keep is None:
        return
    if keep.is_file():
        raise RunError(f"--keep {keep} is a file; give a folder")
    check_no_part(keep)
    real = Path(os.path.realpath(keep))
    for place in (*model_places(pipeline), source):
        if os.path.isdir(place) and real.is_relative_to(os.path.realpath(place)):
            raise RunError(f"--keep {keep} lies in {place}, which is read; give a folder elsewhere")


def drawn_batches(
    pipeline: str,
    model: Any,
    prompts: list[str],
    options: SamplingOptions,
    enlarge: Upscaler | None,
    on_batch: Callable[[int, int], None],
    keep: Path | None = None,
) -> Iterator[Tensor]:
    """Yield batches of samples (B,3,H,W) in [-1,1], enlarged where an enlarger is given.

    Args:
        pipeline: name of the model, by which its weights are found.
        model: the opened pipeline.
        prompts: a prompt or class for each sample.
        options: how the samples are drawn.
        enlarge: applied to the samples as they are drawn.
        on_batch: called with the samples that are done and their number.
        keep: folder of the samples before they are enlarged, in a folder for each set of weights, prompts and settings;
            those of an earlier call are not drawn again.
    """
    settings = {"prompts": hash_values(prompts), **options.settings}
    if keep is not None:
        settings["weights"] = model_fingerprint(model_places(pipeline))
        keep = keep / hash_values(settings)
    part = 2 * options.batch_size
    with nullcontext() if keep is None else kept_images(keep, settings, {"pipeline": pipeline}):
        for start in range(0, len(prompts), part):
            chosen = prompts[start : start + part]
            samples = _part(model, chosen, options, start, keep)
            yield torch.stack([to_tensor(sample) for sample in (enlarge(samples, chosen) if enlarge else samples)])
            on_batch(min(start + part, len(prompts)), len(prompts))


def _part(model: Any, prompts: list[str], options: SamplingOptions, first: int, keep: Path | None) -> list[Image]:
    if keep is None:
        return generate(model, prompts, options, first=first)
    files = [keep / f"{number:06d}.png" for number in range(first, first + len(prompts))]
    if not all(is_drawn(file) for file in files):
        for file, image in zip(files, generate(model, prompts, options, first=first), strict=True):
            with atomic_file(file) as partial:
                image.save(partial, format="PNG")
    return [read_image(file) for file in files]
