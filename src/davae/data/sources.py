"""Picture sources by name, and which of their pictures can be used."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from davae.data.buckets import nearest_bucket
from davae.data.captions.choice import SourceOptions
from davae.data.captions.sidecars import TABLE_OPTIONS
from davae.data.files import TarSource
from davae.data.images import ImageSource, counted, target_name
from davae.data.npz import NpzSource
from davae.data.shards.commands import PIPE
from davae.data.shards.folder import open_file, open_folder, open_table
from davae.data.shards.names import expand_braces, expand_shards, is_shard
from davae.data.shards.remote import is_remote, open_remote
from davae.data.survey import Sizes, measure_sizes
from davae.errors import DataError

logger = logging.getLogger(__name__)

LOGGED = 20  # left-out pictures named one by one; all are counted


def open_source(name: str, resolution: int, options: SourceOptions | None = None) -> ImageSource:
    """The source that a recipe's `data.source` names.

    Args:
        name: `openmoji` or `openmoji-all`; a folder of pictures, shards or parquet files; a `.tar` or shard pattern, also
            behind `pipe:` or a URL that fsspec reads (`hf://datasets/...`, `https://...`); `.parquet` files; an ADM
            `.npz`; or a Hugging Face dataset id.
        resolution: pixels that will be asked for; OpenMoji is rendered large enough.

    Raises:
        DataError: when there is nothing there, in one line that says what was looked for, or an option has no meaning there.
    """
    options = options or SourceOptions()
    check_name(name)
    if name in ("openmoji", "openmoji-all"):
        from davae.data.openmoji import OpenMoji

        options.refuse("OpenMoji", ("caption_key", "caption_weights", "label_key", *TABLE_OPTIONS))
        return OpenMoji(resolution, everything=name == "openmoji-all")
    if name.startswith(PIPE) or (is_remote(name) and not name.endswith(".parquet")):
        return open_remote(expand_braces(name), options)
    if os.path.isdir(name):  # unlike Path's, no error for a pattern longer than a name may be
        return open_folder(Path(name), options)
    if is_shard(name):
        return TarSource(expand_shards(name), options)
    if name.endswith(".npz") and os.path.isfile(name):
        return NpzSource(Path(name), options)
    if name.endswith(".parquet") and (is_remote(name) or glob.glob(name)):
        return open_table(name, options)
    if os.path.isfile(name):
        return open_file(Path(name), options)
    if glob.has_magic(name) and (found := glob.glob(name)):
        raise DataError(
            f"data.source: {name} names {len(found)} files; patterns are for .tar and .parquet files, give the folder of "
            f"images: {Path(found[0]).parent}"
        )
    if name.startswith((".", "/", "~")) or Path(name).suffix:
        raise DataError(f"data.source: {name} does not exist")
    return open_table(name, options)


def check_name(name: str) -> None:
    """Refuse an empty name, as an unset variable of a shell gives: it would mean the current folder.

    Raises:
        DataError: in one line.
    """
    if not name.strip():
        raise DataError("data.source: the name is empty; give a folder, a shard, a table or a dataset id")


@dataclass(frozen=True)
class Survey:
    """Images of a source that can be used, by their headers.

    Attributes:
        indices: images that can be used.
        groups: bucket of each of them.
        left_out: name of every other image, and why.
        pixels: (N,2) width and height of the usable ones.
    """

    indices: list[int]
    groups: np.ndarray
    left_out: dict[str, str]
    pixels: np.ndarray


def survey(
    source: ImageSource,
    indices: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    enlarge: bool = False,
    measured: Sizes | None = None,
    strict: bool = True,
) -> Survey:
    """Find the images that fill a bucket without being enlarged; log the others by name, counted by kind.

    Pixels are not decoded: an image that is damaged behind its header is found when it is read.

    Args:
        sizes: (width, height) of each bucket; none keeps images of every size.
        enlarge: keep images that are smaller than every bucket.
        measured: sizes of the images, where they are known.
        strict: refuse a source without a usable image.

    Raises:
        DataError: when none is left, naming the largest that was found.
    """
    measured = measured or measure_sizes(source, indices)
    kept: list[int] = []  # places
    groups: list[int] = []
    left_out: dict[str, str] = {}
    largest, small = (0, 0), 0
    target = target_name(*sizes[0]) if sizes else ""
    bucket_of = lru_cache(100_000)(lambda width, height: nearest_bucket(sizes, width, height, enlarge))
    for place, (width, height) in enumerate(measured.pixels.tolist()):
        if place in measured.reasons:
            left_out[source.key(indices[place])] = measured.reasons[place]
            continue
        group = bucket_of(width, height) if sizes else 0
        if group is None:
            small, largest = small + 1, max(largest, (width, height), key=min)
            reason = f"too small: {width}x{height} is smaller than the target of {target}"
            left_out[source.key(indices[place])] = reason
            continue
        kept.append(place)
        groups.append(group)
    for name, reason in list(left_out.items())[:LOGGED]:
        logger.warning("left out %s: %s", name, reason)
    if left_out:
        logger.warning("%d of %d pictures can be used; %s", len(kept), len(indices), counted(left_out))
    if strict and left_out and small == len(indices):
        raise DataError(
            f"every picture is smaller than the target of {target} (the largest is {largest[0]}x{largest[1]}): davae "
            "never enlarges training data unless data.enlarge is set; use larger images or a smaller base.resolution"
        )
    if strict and left_out and not kept:
        raise DataError(f"none of the {len(indices)} pictures can be used; {counted(left_out)}")
    return Survey([indices[place] for place in kept], np.asarray(groups, np.int16), left_out, measured.pixels[kept])


def usable(source: ImageSource, indices: Sequence[int], resolution: int, enlarge: bool = False) -> list[int]:
    """The pictures that `survey` leaves for squares of `resolution` pixels."""
    return survey(source, indices, [(resolution, resolution)], enlarge).indices
