"""Local copies of shards, each made once."""

from __future__ import annotations

import gzip
import hashlib
import logging
import lzma
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock
from fsspec.compression import compr

from davae.data.shards.tar_index import index_tar
from davae.errors import DataError
from davae.files.atomic import atomic_file

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $DAVAE_CACHE, else ~/.cache/davae."""
    return Path(os.environ.get("DAVAE_CACHE") or Path.home() / ".cache" / "davae")


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file unless it exists, once for all processes of a machine.

    Args:
        target: the file.
        make: writes and checks it under another name.
    """
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():
                with atomic_file(target) as partial:
                    make(partial)
    return target


PACKED_BY = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
HASHED = 1 << 16  # bytes at both ends of a packed shard: its name in the cache; gzip's check sum lies at the end


def packed_by(head: bytes) -> str | None:
    """Return the compression of a file by its first bytes, None for a plain one."""
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
    """Return the shard itself, or the unpacked copy of a compressed one, to read at random.

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
    """Replace a compressed shard, but not a plain one, by its unpacked bytes.

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
