"""Latents and text embeddings that are not finite: left out, and too many are an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from davae.data.images import summarise_skipped
from davae.data.latent_cache.caption_table import CaptionTable
from davae.data.latent_cache.shard_files import CacheShard, is_sound_shard, latent_shards
from davae.errors import DataError
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

LATENT, EMBEDDING = "latent not finite", "caption embedding not finite"
NOT_FINITE = "not_finite"  # metadata of a text shard: its rows that no training can use
GONE = ("missing file", "cannot be opened")  # kinds of files that were there when the run began
ALLOWED = 0.1  # share of the images; above it the model or the disk is at fault, not the images
NULL_NOT_FINITE = (
    "cache: the embedding of the empty caption, which replaces dropped ones, is not finite; a text encoder overflows: set "
    "cache.dtype and base.dtype to float32, or use another base.model"
)
COUNTED = (  # how reasons begin, and the remedy where they are many
    (
        (LATENT, EMBEDDING),
        "the autoencoder or a text encoder overflows: set run.mixed_precision to bf16 or no and cache.dtype to float32, or "
        "use another base.model",
    ),
    (GONE, "see to their disk, then run the same command again"),
)
ALWAYS = 2  # images that are no reason to stop, however few there are


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, list[str | None]]:
    """Return values (N,...) in the kept dtype, and for each row its fault or None.

    Args:
        values: float32.
        dtype: numpy's name of the dtype to keep; a value beyond its range would be kept as infinity.
    """
    with np.errstate(over="ignore"):
        kept = values.astype(dtype)
    found = np.isfinite(kept).reshape(len(kept), -1).all(1)
    faults: list[str | None] = [None] * len(kept)
    for row in np.flatnonzero(~found):
        beyond = np.isfinite(values[row]).all()
        faults[row] = f"values beyond {dtype}, up to {np.abs(values[row]).max():.3g}" if beyond else "NaN or infinity"
    return kept, faults


def check_many(skipped: Mapping[str, str], images: int, least: int = ALWAYS) -> None:
    """Stop where too many images have no finite latent or embedding, or lost their file.

    The model or the disk is at fault then.

    Args:
        skipped: why images are left out, by name; other reasons are not counted.
        images: how many were looked at.
        least: how many are never too many.

    Raises:
        DataError: too many; the line names some.
    """
    for kinds, remedy in COUNTED:
        lost = {name: why for name, why in skipped.items() if why.startswith(kinds)}
        if len(lost) > max(least, ALLOWED * images):
            first = next(iter(lost.values()))
            raise DataError(f"cache: of {images} images {summarise_skipped(lost)}: {first}; {remedy}")


def is_finished(path: Path) -> bool:
    """Return whether a shard of an interrupted cache is whole and finite, without lost files."""
    if not is_sound_shard(path):
        return False
    metadata = CacheShard(path).metadata
    skipped = load_json(metadata.get("skipped", "{}"))
    return not load_json(metadata.get(NOT_FINITE, "[]")) and not any(
        why.startswith((LATENT, *GONE)) for why in skipped.values()
    )


def lost_captions(
    folder: Path, text: Sequence[tuple[str, int]], table: CaptionTable, name_of: Callable[[int], str]
) -> tuple[list[int], dict[str, str]]:
    """Return the items without a finite caption embedding, and the reasons by image name.

    Args:
        text: (file, rows) of the text shards.
        table: the captions of the items.
        name_of: the number of an image -> its name.

    Raises:
        DataError: the empty caption has no finite embedding, or many others have none.
    """
    rows: list[int] = []
    start = 0
    for name, count in text:
        rows += [start + row for row in load_json(CacheShard(folder / name).metadata.get(NOT_FINITE, "[]"))]
        start += count
    if not rows:
        return [], {}
    if rows[0] == 0:
        raise DataError(NULL_NOT_FINITE)
    numbers = [number for path in latent_shards(folder) for number in _numbers(path)]
    items = np.flatnonzero(np.isin(table.rows, rows)).tolist()
    lost: dict[str, str] = {}
    for item in items:
        name = name_of(numbers[item])
        lost[name] = f"{EMBEDDING}: '{table[item][:60]}'"
        logger.warning("skipped %s: %s", name, lost[name])
    check_many(lost, len(set(numbers)))
    return items, lost


def _numbers(path: Path) -> list[int]:
    """Return the number of each item's image, -1 in an imported cache without images."""
    shard = CacheShard(path)
    if "images" in shard.names:
        return shard.tensor("images").tolist()
    return [-1] * len(shard.tensor("labels"))
