"""Index of WebDataset shards: the places of all images and sidecars, to read at random.

webdataset reads shards as streams. A stream can neither be resumed to the bit nor shared between processes without
repeating or losing a sample, so davae keeps its own index and reads members by their place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from davae.data.captions.file_names import is_hidden, match
from davae.data.findings import Tally, add_to, printable
from davae.data.formats import image_endings
from davae.errors import DataError, RunError
from davae.files.atomic import atomic_file, saving
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

KINDS = ("picture", "txt", "json", "cls")
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
INDEX_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class TarMember:
    """Bytes of a member: offset, size, and for a sparse file its pieces."""

    position: int
    offset: int
    size: int
    sparse: tuple[tuple[int, int], ...] | None = None


@dataclass
class TarIndex:
    """Samples of one shard.

    Attributes:
        samples: key -> (kinds, 2) offset and size of its members, -1 where there is none.
        sparse: offset -> pieces of the members that are stored with holes.
        unused, duplicates: counts by kind.
        counts: samples with a file of each kind.
    """

    samples: dict[str, np.ndarray] = field(default_factory=dict)
    sparse: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    unused: dict[str, Tally] = field(default_factory=dict)
    duplicates: dict[str, Tally] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def index_tar(shard: Path) -> dict[str, np.ndarray]:
    """Return the samples of a plain shard, key -> (kinds, 2) offset and size of its members.

    Raises:
        DataError: a shard that is not there, not whole, or with two images of one key.
    """
    return read_index(shard).samples


def read_index(shard: Path) -> TarIndex:
    """Index a plain shard.

    Raises:
        DataError: a shard that is not there, not whole, or with two images of one key.
    """
    index = TarIndex()
    try:
        members = _members(shard, index)
    except DAMAGE as error:
        raise DataError(f"shard {shard} is not a whole tar file: {error}") from error
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror or error}") from error
    folders: dict[str, list[str]] = defaultdict(list)
    for name in members:
        folders[posixpath.dirname(name)].append(posixpath.basename(name))
    found: list[tuple[int, str, np.ndarray]] = []
    for folder, names in folders.items():
        prefix = f"{folder}/" if folder else ""
        part = match(names, prefix, index.unused, shard=True)
        part.count_rest(prefix, index.unused)
        if part.twice:
            first, second = part.twice[0]
            raise DataError(
                f"shard {shard}: {prefix}{first} and {prefix}{second} are two images of one key "
                f"({len(part.twice)} such pairs); keep one image of each key"
            )
        for image in part.images:
            own: dict[str, TarMember] = {"picture": members[prefix + image]}
            own |= {kind: members[prefix + name] for kind, name in part.sidecars.get(image, {}).items()}
            places = np.full((len(KINDS), 2), -1, np.int64)
            for kind, place in own.items():
                places[KINDS.index(kind)] = place.offset, place.size
                index.counts[kind] = index.counts.get(kind, 0) + 1
                if place.sparse is not None:
                    index.sparse[place.offset] = place.sparse
            found.append((min(place.position for place in own.values()), (prefix + image).rpartition(".")[0], places))
    index.samples = {key: places for _, key, places in sorted(found, key=lambda entry: entry[0])}
    return index


def _members(shard: Path, index: TarIndex) -> dict[str, TarMember]:
    """Return the files of a shard by normalised name, the last one of each, as tar does."""
    members: dict[str, TarMember] = {}
    links: dict[str, tuple[int, str]] = {}
    end = 0
    with tarfile.open(shard, "r:") as archive:
        for position, member in enumerate(archive):
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            if member.isdir():
                continue
            name = _plain(member.name)
            if any(is_hidden(part) for part in name.split("/")):
                add_to(index.unused, "hidden file", name)
                continue
            if member.islnk() or member.issym():
                near = "" if member.islnk() else posixpath.dirname(name)
                links[name] = position, _plain(posixpath.join(near, member.linkname))
                continue
            if not (member.isreg() or member.issparse()):
                add_to(index.unused, "not a regular file", name)
                continue
            if name in members:
                add_to(index.duplicates, "member that comes twice, the last one is read", name)
            sparse: Any = member.sparse
            pieces = tuple((at, length) for at, length in sparse) if member.issparse() else None
            stored = member.size if pieces is None else sum(length for _, length in pieces)
            if min(member.size, *(number for piece in pieces or () for number in piece), 0) < 0:
                raise EOFError(f"{name!r} has a negative size")
            first = members[name].position if name in members else position
            members[name] = TarMember(first, member.offset_data, member.size, pieces)
            end = max(end, member.offset_data + stored)
    if end > shard.stat().st_size:
        raise EOFError("it ends inside its last file")
    for name, (position, target) in links.items():
        for _ in range(40):  # a link to a link; the system's limit
            if target in members or target not in links:
                break
            target = links[target][1]
        if target in members:
            place = members[target]
            members[name] = TarMember(position, place.offset, place.size, place.sparse)
        else:
            add_to(index.unused, "broken link", name)
    return members


def _plain(name: str) -> str:
    """Return a member's name without `./`, `//` and a leading `/`."""
    return posixpath.normpath(name).lstrip("/")


def read_place(
    descriptor: int, offset: int, size: int, pieces: tuple[tuple[int, int], ...] | None, limit: int
) -> bytes:
    """Return at most `limit` bytes of a member, with zeros for the holes of a sparse one."""
    if pieces is None:
        return os.pread(descriptor, min(size, limit), offset)
    whole = bytearray(min(size, limit))
    for at, length in pieces:
        part = os.pread(descriptor, max(0, min(length, len(whole) - at)), offset)
        whole[at : at + len(part)] = part
        offset += length
    return bytes(whole)


VERSION = 1  # of the rules by which members become samples
KEPT_FROM = 5_000  # samples; a smaller index is made in a second


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
    except INDEX_DAMAGE as error:
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
