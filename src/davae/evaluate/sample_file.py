"""Sample files: N images as uint8 in one `.npz`, as ADM's evaluation suite reads them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from davae.backbones.classes import class_count, goes_by_class
from davae.data.latent_cache.key import hash_values
from davae.errors import ModelError
from davae.files.atomic import atomic_file, saving
from davae.files.outputs import archive_comment, check_archive, check_place, is_drawn
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, model_places, open_model
from davae.sample.resume import kept_images

Labels = Literal["balanced", "random"]
PART = 250  # images a part: what an interruption can cost


def class_schedule(num: int, num_classes: int, labels: Labels, seed: int) -> np.ndarray:
    """Return the class of each image (num,): equal numbers a class, or drawn by seed.

    Args:
        num: images.
        num_classes: classes of the model.
        labels: `balanced` or `random`.
        seed: seed of `random`.

    Raises:
        ModelError: a balanced number that does not divide.
    """
    if labels == "random":
        return np.random.default_rng(seed % 2**64).integers(0, num_classes, num)
    if num % num_classes:
        raise ModelError(f"{num} images do not divide into {num_classes} classes; use a multiple, or random labels")
    return np.arange(num) % num_classes


def field_uint8(images: Tensor) -> np.ndarray:
    """Return images (B,3,H,W) in [0,1] as uint8 (B,H,W,3), floor(255 x + 0.5) as published."""
    pixels = (images.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def write_samples(
    target: Path,
    labels: np.ndarray,
    draw: Callable[[list[int], int], Tensor],
    *,
    settings: dict[str, Any],
    about: dict[str, Any] | None = None,
    former: dict[str, Any] | None = None,
    rank: int = 0,
    ranks: int = 1,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Draw the missing parts of this rank, and join all parts once none is missing.

    Parts lie in `<target>.parts`, each written whole or not at all. Image i depends on the settings and i alone.

    Args:
        labels: (N,) class of every image.
        draw: (classes, number of the first) -> images (B,3,H,W) in [0,1].
        settings: what determines the images; parts of other settings are refused.
        about: what is kept with the settings and determines nothing, such as the pipeline's path.
        former: the settings that davae versions without fingerprints of weights kept.

    Returns:
        Whether `target` was written (False while other ranks still draw).

    Raises:
        ModelError: the parts folder belongs to other settings.
        RunError: a file that davae did not write has the target's name, or another process draws the same file.
    """
    folder = target.with_name(f"{target.name}.parts")
    check_archive(target, folder)
    count = {"num": len(labels)}
    kept = {**settings, **count}
    comment = f"davae {hash_values(kept)}".encode()
    if target.is_file() and archive_comment(target) == comment:
        return True
    before = None if former is None else {**former, **count}
    with kept_images(folder, kept, about or {}, former=before, first=rank == 0):
        return _draw_parts(target, folder, labels, draw, comment, rank, ranks, on_part)


def _draw_parts(
    target: Path,
    folder: Path,
    labels: np.ndarray,
    draw: Callable[[list[int], int], Tensor],
    comment: bytes,
    rank: int,
    ranks: int,
    on_part: Callable[[int, int], None],
) -> bool:
    """Draw this rank's parts, and return whether all parts were there and joined."""
    starts = range(0, len(labels), PART)
    for number, start in enumerate(starts):
        part = folder / f"part-{start:08d}.npy"
        if number % ranks == rank and not is_drawn(part):
            classes = [int(label) for label in labels[start : start + PART]]
            with atomic_file(part) as partial:
                np.save(partial, field_uint8(draw(classes, start)))
        on_part(min(start + PART, len(labels)), len(labels))
    parts = [folder / f"part-{start:08d}.npy" for start in starts]
    if not all(is_drawn(part) for part in parts):
        return False
    with atomic_file(target) as partial:
        _join(partial, parts, labels, comment)
    return True


def _join(path: Path, parts: list[Path], labels: np.ndarray, comment: bytes) -> None:
    """Write `arr_0` (N,H,W,3) uint8 and `arr_1` (N,) labels, with one part in memory."""
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = comment
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                stream.write(np.load(part).tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, np.asarray(labels, dtype=np.int64))


def write_sample_file(
    pipeline: str,
    target: Path,
    options: SamplingOptions,
    *,
    num: int,
    labels: Labels,
    on_part: Callable[[int, int], None],
) -> bool:
    """Draw a sample file of a class-conditional model, this process's share of the parts.

    Args:
        pipeline: the model, by the names that `open_model` takes.
        target: the `.npz` to write.
        options: how the images are drawn, at the model's own size.
        num: images.
        labels: `balanced` or `random` classes, as `class_schedule` takes them.
        on_part: called with the images that are done and their number.

    Returns:
        Whether the file is whole; other processes may still draw their parts.

    Raises:
        ModelError: a model that draws prompts, or parts of other settings.
        RunError: a file of this name that davae did not write.
    """
    check_place(target)
    weights = model_fingerprint(model_places(pipeline))
    model, _ = open_model(pipeline, options.placement)
    if not goes_by_class(model):
        raise ModelError(f"{pipeline} is not a class-conditional model; sample files follow the ImageNet protocol")
    state = PartialState()

    def draw(classes: list[int], first: int) -> Tensor:
        prompts = [str(number) for number in classes]
        return torch.stack(generate(model, prompts, options, output_type="pt", first=first))

    settings = {"labels": labels, **options.settings}
    with saving(target):
        return write_samples(
            target,
            class_schedule(num, class_count(model), labels, options.seed),
            draw,
            settings={**settings, "weights": weights},
            about={"pipeline": pipeline},
            former={**settings, "pipeline": pipeline},
            rank=state.process_index,
            ranks=state.num_processes,
            on_part=on_part,
        )
