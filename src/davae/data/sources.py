"""Picture sources by name, and which of their pictures can be used."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from davae.data.buckets import nearest_bucket
from davae.data.captions import SourceOptions
from davae.data.commands import PIPE
from davae.data.files import EXTENSIONS, TABLE_OPTIONS, FolderSource, NpzSource, TarSource
from davae.data.pictures import DataError, PictureSource, UnreadablePicture, counted, target_name
from davae.data.remote import is_remote, open_remote, open_stream
from davae.data.tables import TableSource

logger = logging.getLogger(__name__)

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
LOGGED = 20  # left-out pictures named one by one; all are counted


def expand_braces(pattern: str) -> list[str]:
    """'a-{000..003}.tar' -> its four names."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand_braces(pattern[: found.start()] + n + pattern[found.end() :])]


def expand_shards(pattern: str) -> list[Path]:
    """'a-{000..003}.tar' and '*.tar' -> existing files in order.

    Raises:
        DataError: a name that stands for no file.
    """
    paths: list[Path] = []
    for name in expand_braces(pattern):
        found = [Path(p) for p in sorted(glob.glob(name))]
        if not found:
            raise DataError(f"data.source: no shard matches {name}")
        paths += found
    return paths


def open_folder(folder: Path, options: SourceOptions) -> PictureSource:
    """Loose pictures, or the `.tar` shards or `.parquet` files that lie directly in the folder.

    Raises:
        DataError: both, where it is not plain which is meant.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards and not any(folder.glob("*.parquet")):
        return FolderSource(folder, options)
    loose = next((p for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS), None)
    if loose is not None:
        raise DataError(
            f"folder {folder} holds shards and loose pictures ({loose.name}); name the shards: {folder}/*.tar"
        )
    return TarSource(shards, options) if shards else open_table(f"{folder}/*.parquet", options)


def open_table(name: str, options: SourceOptions) -> PictureSource:
    return open_stream(name, options) if options.streaming else TableSource(name, options)


def open_source(name: str, resolution: int, options: SourceOptions | None = None) -> PictureSource:
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
    if name in ("openmoji", "openmoji-all"):
        from davae.data.openmoji import OpenMoji

        options.refuse("OpenMoji", ("caption_key", "caption_weights", "label_key", *TABLE_OPTIONS))
        return OpenMoji(resolution, everything=name == "openmoji-all")
    if name.startswith(PIPE) or (is_remote(name) and not name.endswith(".parquet")):
        return open_remote(expand_braces(name), options)
    if Path(name).is_dir():
        return open_folder(Path(name), options)
    if name.endswith(".tar"):
        return TarSource(expand_shards(name), options)
    if name.endswith(".npz") and Path(name).is_file():
        return NpzSource(Path(name), options)
    if name.endswith(".parquet") and (is_remote(name) or glob.glob(name)):
        return open_table(name, options)
    if name.startswith((".", "/", "~")) or Path(name).suffix:
        raise DataError(f"data.source: {name} does not exist")
    return open_table(name, options)


@dataclass(frozen=True)
class Survey:
    """What the headers of a source's pictures say.

    Attributes:
        indices: pictures that are large enough.
        groups: the bucket of each of them.
        left_out: the other pictures' names, and why.
    """

    indices: list[int]
    groups: np.ndarray
    left_out: dict[str, str]


def survey(
    source: PictureSource, indices: Sequence[int], sizes: Sequence[tuple[int, int]], enlarge: bool = False
) -> Survey:
    """Which pictures fill a bucket without being enlarged; the others are named in the log, counted by kind.

    Pixels are not decoded: a picture that is damaged behind its header is found when it is read.

    Args:
        sizes: (width, height) of each bucket.
        enlarge: keep images that are smaller than every bucket.

    Raises:
        DataError: when none is left, naming the largest that was found.
    """
    kept: list[int] = []
    groups: list[int] = []
    left_out: dict[str, str] = {}
    largest, small = (0, 0), 0
    target = target_name(*sizes[0])
    for index in indices:
        try:
            width, height = source.size(index)
        except UnreadablePicture as error:
            left_out[source.key(index)] = str(error)
            continue
        group = nearest_bucket(sizes, width, height, enlarge)
        if group is None:
            small, largest = small + 1, max(largest, (width, height), key=min)
            left_out[source.key(index)] = f"too small: {width}x{height} is smaller than the target of {target}"
            continue
        kept.append(index)
        groups.append(group)
    for name, reason in list(left_out.items())[:LOGGED]:
        logger.warning("left out %s: %s", name, reason)
    if left_out:
        logger.warning("%d of %d pictures can be used; %s", len(kept), len(indices), counted(left_out))
    if left_out and small == len(indices):
        raise DataError(
            f"every picture is smaller than the target of {target} (the largest is {largest[0]}x{largest[1]}): davae "
            "never enlarges training data unless data.enlarge is set; use larger images or a smaller base.resolution"
        )
    if left_out and not kept:
        raise DataError(f"none of the {len(indices)} pictures can be used; {counted(left_out)}")
    return Survey(kept, np.asarray(groups, np.int16), left_out)


def usable(source: PictureSource, indices: Sequence[int], resolution: int, enlarge: bool = False) -> list[int]:
    """The pictures that `survey` leaves for squares of `resolution` pixels."""
    return survey(source, indices, [(resolution, resolution)], enlarge).indices
