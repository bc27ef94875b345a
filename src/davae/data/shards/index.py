"""Index of many shards, kept on disk: a later start does not go through every member again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from davae.data.findings import Tally, add_to, printable
from davae.data.formats import image_endings
from davae.data.shards.tar_index import TarIndex, read_index
from davae.errors import RunError
from davae.files.atomic import atomic_file, saving
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

VERSION = 1  # of the rules by which members become samples
KEPT_FROM = 5_000  # samples; a smaller index is made in a second
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass
class ShardIndex:
    """Samples of all shards.

    Attributes:
        names: unique name of each sample.
        shard_of: (N,) number of its shard.
        places: (N, kinds, 2) offset and size of its members, -1 where there is none.
        sparse: (shard, offset) -> pieces of members that are stored with holes.
        unused, duplicates: counts by kind.
        counts: samples with a file of each kind.
    """

    names: list[str] = field(default_factory=list)
    shard_of: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 4, 2), np.int64))
    sparse: dict[tuple[int, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    unused: dict[str, Tally] = field(default_factory=dict)
    duplicates: dict[str, Tally] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def index_shards(shards: Sequence[Path], shown: Sequence[str], folder: Path) -> ShardIndex:
    """Return the index of plain shards, from disk where the same files were indexed before.

    Args:
        shards: the files.
        shown: their unique names.
        folder: where the index is kept.

    Raises:
        DataError: a shard that cannot be read.
    """
    kept = folder / f"{_key(shards, shown)}.npz"
    try:
        if kept.is_file():
            return _load(kept)
    except DAMAGE as error:
        logger.warning("index %s is damaged and is made again: %s", kept, error)
    index = _make(shards, shown)
    if len(index.names) >= KEPT_FROM:
        try:
            with saving(kept):
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(kept) as partial:
                    _save(partial, index)
        except (OSError, RunError) as error:  # it only saves time
            logger.warning("the index of the shards is not kept: %s", error)
    return index


def _key(shards: Sequence[Path], shown: Sequence[str]) -> str:
    """Hash places, sizes and times of the files: a file that changes is indexed again."""
    parts: list[object] = [VERSION, sorted(image_endings()), list(shown)]
    for shard in shards:
        if not shard.is_file():
            break  # indexing names it
        status = shard.stat()
        parts.append((os.path.realpath(shard), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _make(shards: Sequence[Path], shown: Sequence[str]) -> ShardIndex:
    whole = ShardIndex()
    places: list[np.ndarray] = []
    shard_of: list[int] = []
    counts: Counter[str] = Counter()
    for number, (shard, name) in enumerate(zip(shards, shown, strict=True)):
        index = read_index(shard)
        whole.names += [printable(f"{name}/{stem}") for stem in index.samples]
        shard_of += [number] * len(index.samples)
        whole.sparse |= {(number, offset): pieces for offset, pieces in index.sparse.items()}
        places += index.samples.values()
        counts.update(index.counts)
        _gather(index, name, whole)
    whole.counts = dict(counts)
    whole.shard_of = np.asarray(shard_of, np.int32)
    if places:
        whole.places = np.stack(places)
    return whole


def _gather(index: TarIndex, shard: str, whole: ShardIndex) -> None:
    """Add a shard's counts to those of the source."""
    for own, total in ((index.unused, whole.unused), (index.duplicates, whole.duplicates)):
        for kind, tally in own.items():
            for name in tally.names:
                add_to(total, kind, f"{shard}/{name}")
            total[kind].count += tally.count - len(tally.names)


def _save(path: Path, index: ShardIndex) -> None:
    about = {
        "sparse": [[*place, pieces] for place, pieces in index.sparse.items()],
        "unused": {kind: asdict(tally) for kind, tally in index.unused.items()},
        "duplicates": {kind: asdict(tally) for kind, tally in index.duplicates.items()},
        "counts": index.counts,
    }
    with path.open("wb") as stream:
        np.savez(
            stream,
            names=np.frombuffer("\0".join(index.names).encode(), np.uint8),
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            shard_of=index.shard_of,
            places=index.places,
        )


def _load(path: Path) -> ShardIndex:
    with np.load(path) as file:
        about = load_json(file["about"].tobytes())
        index = ShardIndex(
            file["names"].tobytes().decode().split("\0"),
            file["shard_of"],
            file["places"],
            {(shard, offset): tuple((at, n) for at, n in pieces) for shard, offset, pieces in about["sparse"]},
            {kind: Tally(**tally) for kind, tally in about["unused"].items()},
            {kind: Tally(**tally) for kind, tally in about["duplicates"].items()},
            about["counts"],
        )
    if not len(index.names) == len(index.places) == len(index.shard_of):
        raise ValueError("its parts differ in length")
    return index
