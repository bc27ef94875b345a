"""Distinct captions of any number of items, on disk instead of in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from davae.data.latent_cache.shard_files import REMEDY, open_array, save_array
from davae.errors import DataError
from davae.files.atomic import atomic_file

TEXTS, ENDS, DIGESTS, ITEMS = "captions.npy", "caption_ends.npy", "caption_digests.npy", "caption_of_item.npy"


def caption_digest(text: bytes) -> bytes:
    """Return a hash of a caption, 32 characters of which the empty one sorts first."""
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode() if text else b"0" * 32


def pack(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the UTF-8 of all texts, and where each ends, (N+1,) from 0."""
    parts = [text.encode() for text in texts]
    ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def unpack(texts: np.ndarray, ends: np.ndarray) -> Iterator[bytes]:
    whole = texts.tobytes()
    for start, end in pairwise(ends.tolist()):
        yield whole[start:end]


def write_table(folder: Path, shards: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write the distinct captions by digest, the empty one first, and the row of each item.

    Args:
        shards: packed captions of the items, shard by shard; gone through twice, one in memory at a time.
    """
    shards = list(shards) if isinstance(shards, Iterator) else shards
    digests, lengths = [np.asarray([caption_digest(b"")], "S32")], [np.zeros(1, np.int64)]
    for texts, ends in shards:
        digests.append(np.asarray([caption_digest(text) for text in unpack(texts, ends)], "S32"))
        lengths.append(np.diff(ends))
    flat, sizes = np.concatenate(digests), np.concatenate(lengths)
    distinct, first, rows = np.unique(flat, return_index=True, return_inverse=True)
    table_ends = np.cumsum(np.concatenate([[0], sizes[first]]), dtype=np.int64)
    total = max(1, int(table_ends[-1]))
    row_of = np.full(len(flat), -1, np.int64)  # of captions that are met for the first time
    row_of[first] = np.arange(len(first))
    header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
    with atomic_file(folder / TEXTS) as partial, partial.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        begin, place = stream.tell(), 1
        stream.truncate(begin + total)
        for texts, ends in shards:  # written, not mapped: a full disk is an error here, in a map it kills the process
            for number, text in enumerate(unpack(texts, ends), place):
                if (row := row_of[number]) >= 0 and text:
                    stream.seek(begin + int(table_ends[row]))
                    stream.write(text)
            place += len(ends) - 1
    save_array(folder / ENDS, table_ends)
    save_array(folder / DIGESTS, distinct)
    save_array(folder / ITEMS, rows.reshape(-1)[1:].astype(np.int32))


class CaptionTable(Sequence[str]):
    """Captions of a cache's items, read from disk one by one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts, self.ends, self.digests, self.rows = (
            open_array(folder / name) for name in (TEXTS, ENDS, DIGESTS, ITEMS)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self.distinct(int(self.rows[index]))

    @property
    def count(self) -> int:
        """Distinct captions."""
        return len(self.digests)

    def distinct(self, row: int) -> str:
        text = self.texts[self.ends[row] : self.ends[row + 1]].tobytes()
        if caption_digest(text) != self.digests[row]:
            raise DataError(f"cache file {self.folder / TEXTS}: caption {row} is not what was written; {REMEDY}")
        return text.decode()

    def row(self, caption: str) -> int:
        """Return the row of a caption, or raise a DataError for an unknown one."""
        digest = np.bytes_(caption_digest(caption.encode()))
        row = int(np.searchsorted(self.digests, digest))
        if row == len(self.digests) or self.digests[row] != digest:
            raise DataError(f"cache {self.folder} has no caption '{caption}'")
        return row
