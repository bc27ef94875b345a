"""Index of a WebDataset shard: where each image and what belongs to it lies, so that training can read at random.

webdataset reads shards as streams. A stream can neither be resumed to the bit nor shared between processes without
repeating or losing a sample, so davae keeps its own index and reads members by their place.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import lzma
import os
import posixpath
import shutil
import tarfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from fsspec.compression import compr

from davae.data.captions.matching import is_hidden, match
from davae.data.findings import Tally, add_to
from davae.data.shards.copies import once
from davae.errors import DataError

logger = logging.getLogger(__name__)

KINDS = ("picture", "txt", "json", "cls")
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
PACKED_BY = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
HASHED = 1 << 16  # bytes at both ends of a packed shard: its name in the cache; gzip's check sum lies at the end


@dataclass(frozen=True)
class Place:
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


def packed_by(head: bytes) -> str | None:
    """Return the compression of a file by its first bytes, None for a plain one; names mislead."""
    return next((name for mark, name in PACKED_BY.items() if head.startswith(mark)), None)


def unpacked(stream: IO[bytes], packing: str, name: str) -> Any:
    """Return a stream of the unpacked bytes, through fsspec.

    Raises:
        DataError: a compression whose package is not installed.
    """
    if packing not in compr:
        raise DataError(f"shard {name} is packed with {packing}; `pip install zstandard`, or unpack it first")
    return compr[packing](stream, mode="rb")


def plain_shard(shard: Path, folder: Path) -> Path:
    """Return the shard itself, or for a compressed one (SA-1B) its unpacked copy: members can only be read at random there.

    Args:
        shard: the file.
        folder: where copies are kept; each is made once and found again by size and content, wherever the shard lies.

    Raises:
        DataError: it cannot be read or unpacked.
    """
    if shard.exists() and not shard.is_file():  # a named pipe would be waited for without end
        raise DataError(f"shard {shard} is not a regular file; name a tar file, or read a command with pipe:")
    try:
        with shard.open("rb") as stream:
            head = stream.read(HASHED)
            if (packing := packed_by(head)) is None:
                return shard
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - HASHED))
            digest = hashlib.sha256(head + stream.read() + str(size).encode()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror or error}") from error
    target = folder / f"{digest}-{shard.name.partition('.')[0][-40:]}.tar"

    def copy(partial: Path) -> None:
        logger.info("unpacking %s to %s", shard, target)
        _unpack(shard, partial, packing)
        index_tar(partial)

    try:
        return once(target, copy)
    except DataError as error:
        raise DataError(f"shard {shard}, packed with {packing}: {error}") from error


def _unpack(source: Path, target: Path, packing: str) -> None:
    """Write the unpacked bytes of a file.

    Raises:
        DataError: it is not whole.
    """
    try:
        with source.open("rb") as stream, unpacked(stream, packing, source.name) as plain, target.open("wb") as sink:
            shutil.copyfileobj(plain, sink, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{source.name} is not a whole file: {' '.join(str(error).split())[:120]}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's; bz2 raises damage without a number
            raise
        raise DataError(f"{source.name} is not a whole file: {' '.join(str(error).split())[:120]}") from error


def unpack_in_place(shard: Path) -> None:
    """Replace a compressed shard by its unpacked bytes; a plain one stays.

    Raises:
        DataError: it is not whole.
    """
    with shard.open("rb") as stream:
        packing = packed_by(stream.read(8))
    if packing is not None:
        plain = shard.with_name(f"{shard.name}.unpacked")
        try:
            _unpack(shard, plain, packing)
            plain.replace(shard)
        finally:
            plain.unlink(missing_ok=True)


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
            own: dict[str, Place] = {"picture": members[prefix + image]}
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


def _members(shard: Path, index: TarIndex) -> dict[str, Place]:
    """Return the files of a shard by their normalised names; of a name that comes twice the last one, as tar extracts it."""
    members: dict[str, Place] = {}
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
            members[name] = Place(first, member.offset_data, member.size, pieces)
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
            members[name] = Place(position, place.offset, place.size, place.sparse)
        else:
            add_to(index.unused, "broken link", name)
    return members


def _plain(name: str) -> str:
    """Return a member's name without `./`, `//` and a leading `/`."""
    return posixpath.normpath(name).lstrip("/")


def read_place(
    descriptor: int, offset: int, size: int, pieces: tuple[tuple[int, int], ...] | None, limit: int
) -> bytes:
    """Return at most `limit` bytes of a member; holes of a sparse one are zeros."""
    if pieces is None:
        return os.pread(descriptor, min(size, limit), offset)
    whole = bytearray(min(size, limit))
    for at, length in pieces:
        part = os.pread(descriptor, max(0, min(length, len(whole) - at)), offset)
        whole[at : at + len(part)] = part
        offset += length
    return bytes(whole)
