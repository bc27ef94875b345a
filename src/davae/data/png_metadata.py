"""Metadata of a PNG, before and after its pixels, without reading the pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # kinds of chunk that may hold an orientation
MAX_CHUNK = 1 << 24  # bytes
TAIL = 72 << 10  # bytes: the last chunk of pixels of most encoders, and what comes after it


def png_metadata(stream: IO[bytes]) -> io.BytesIO:
    """Copy a PNG's metadata into a PNG of one pixel, which Pillow reads by its own rules.

    The beginning is read up to the pixels, and the end from the last chunk of pixels on. Where that is longer than the
    tail, all chunks are stepped over.

    Args:
        stream: the file, at any position.
    """
    length = stream.seek(0, io.SEEK_END)
    stream.seek(len(SIGNATURE))
    before, pixels = _walk(stream, until=b"IDAT")
    stream.seek(max(pixels, length - TAIL))
    after = _after_pixels(stream.read(TAIL))
    if after is None:
        stream.seek(pixels)
        after, _ = _walk(stream, until=b"IEND")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    return io.BytesIO(SIGNATURE + head + before + after + end)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk as it lies in the file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _walk(stream: IO[bytes], until: bytes) -> tuple[bytes, int]:
    """Return the metadata up to a chunk of the kind `until`, and where that chunk begins."""
    parts: list[bytes] = []
    while True:
        place = stream.tell()
        head = stream.read(8)
        if len(head) < 8:
            return b"".join(parts), place
        size, kind = struct.unpack(">I4s", head)
        if kind == until:
            return b"".join(parts), place
        if kind in METADATA and size <= MAX_CHUNK:
            parts.append(head + stream.read(size + 4))
        else:
            stream.seek(size + 4, io.SEEK_CUR)


def _after_pixels(tail: bytes) -> bytes | None:
    """Return the metadata behind the last chunk of pixels, None for a tail that is too short."""
    place = len(tail)
    while (place := tail.rfind(b"IDAT", 0, place)) >= 4:
        chunks = list(_chain(tail, place - 4))
        if chunks and chunks[-1][0] == b"IEND":  # the four letters may also come by chance in the pixels
            return b"".join(data for kind, data in chunks if kind in METADATA)
    return None


def _chain(data: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and bytes of the chunks that follow each other up to IEND."""
    while place + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + size > len(data):
            return
        yield kind, data[place : place + 12 + size]
        if kind == b"IEND":
            return
        place += 12 + size
