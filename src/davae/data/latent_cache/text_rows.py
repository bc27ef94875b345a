"""Prompt embeddings in a cache: without padding, in a half precision that holds them.

A row is one caption's output of one text encoder, (L,...) or (d,). Positions at its end that are all zeros, as padding leaves
them, are not stored; reading puts them back, so that a row reads as it was embedded. Values that float16 cannot hold, as
hidden states of language models have, are kept as bfloat16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from davae.data.latent_cache.not_finite import ALLOWED, is_finished, stored
from davae.data.latent_cache.shard_files import CacheShard
from davae.files.checksums import SUFFIX, array_sum

ENDS, SHAPE = ".ends", ".shape"  # of the tensors that hold where each row ends, and the shape of a whole one
WORTH = 0.95  # rows are stored without padding where that leaves less than this share
CAPTIONS = "captions"  # tensor of a hash of the captions that the rows belong to; earlier versions had none
BEYOND = float(np.finfo(np.float16).max)


def bits_of(values: np.ndarray) -> np.ndarray:
    """Return float32 values rounded to bfloat16, as uint16 bits."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def lengths_of(values: np.ndarray) -> np.ndarray:
    """Return the positions of each row (N,L,...) up to the last not all zero, (N,), at least 1."""
    used = (values.reshape(*values.shape[:2], -1) != 0).any(2)  # (N,L)
    return np.where(used.any(1), values.shape[1] - used[:, ::-1].argmax(1), 1)


def kept_values(values: np.ndarray, dtype: str) -> tuple[np.ndarray, list[str | None]]:
    """Return rows as they are kept, and the fault of each or None.

    A few rows beyond float16 are faults; where the empty caption or many rows are, the encoder's values are that large.

    Args:
        values: (N,...) float32.
        dtype: numpy's name of the dtype to keep.
    """
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(values).reshape(len(values), -1).all(1)
            large = finite & (np.abs(values).reshape(len(values), -1).max(1) > BEYOND)
        if large[:1].any() or large.sum() > max(1, ALLOWED * len(values)):
            faults = [None if fine else "NaN or infinity" for fine in finite.reshape(-1)]
            return bits_of(values), faults
    return stored(values, dtype)


def packed(parts: Sequence[np.ndarray], dtype: str) -> tuple[dict[str, np.ndarray], set[int]]:
    """Pack a shard's embeddings.

    Args:
        parts: one array (N,...) per output of the encoder, float32.
        dtype: numpy's name of the dtype to keep.

    Returns:
        Tensors by name, with a checksum a row: bfloat16 bits as uint16. Rows whose values are not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    bad: set[int] = set()
    for number, whole in enumerate(parts):
        name = f"part_{number}"
        values, faults = kept_values(whole, dtype)
        bad |= {row for row, fault in enumerate(faults) if fault is not None}
        rows: Sequence[np.ndarray] = list(values)
        if values.ndim > 2 and len(values):
            lengths = lengths_of(values)
            if lengths.sum() < WORTH * values.shape[0] * values.shape[1]:
                tensors[f"{name}{SHAPE}"] = np.asarray(values.shape[1:], np.int64)
                rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
                tensors[f"{name}{ENDS}"] = np.cumsum([0, *lengths], dtype=np.int64)
                values = np.concatenate(rows)
        tensors[name] = values
        tensors[f"{name}{SUFFIX}"] = np.asarray([array_sum(row) for row in rows], np.uint32)
    return tensors, bad


def captions_hash(digests: np.ndarray) -> np.ndarray:
    """Return a hash of a stretch of a caption table, (16,) uint8.

    A caption more or less shifts all rows behind it.
    """
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(digests).tobytes()).digest()[:16], np.uint8)


def is_finished_text(path: Path, captions: np.ndarray) -> bool:
    """Return whether a shard can stay: whole, finite, and made from these captions.

    A shard of earlier versions does not show its captions and is made again; a whole cache of them is read as it is.

    Args:
        captions: of `captions_hash`.
    """
    if not is_finished(path):
        return False
    shard = CacheShard(path)
    return CAPTIONS in shard.names and np.array_equal(shard.tensor(CAPTIONS), captions)


def part_names(shard: CacheShard) -> list[str]:
    """Return the tensors that hold embeddings, in the encoder's order."""
    names = [name for name in shard.names if name != CAPTIONS and not name.endswith((ENDS, SHAPE))]
    return sorted(names, key=lambda name: int(name.removeprefix("part_")))


class TextShard:
    """Rows of one open shard, of this version or an earlier one.

    Raises:
        DataError: the file is gone, cut, or not what was written.
    """

    def __init__(self, path: Path):
        shard = CacheShard(path)
        self.shard, self.names = shard, part_names(shard)
        ragged = [name for name in self.names if f"{name}{ENDS}" in shard.names]
        self.ends = {name: shard.tensor(f"{name}{ENDS}") for name in ragged}
        self.shapes = {name: tuple(shard.tensor(f"{name}{SHAPE}").tolist()) for name in ragged}

    def row(self, index: int) -> list[Tensor]:
        """Return one caption's embeddings, whole, in the precision that they are kept in."""
        return [self._part(name, index) for name in self.names]

    def _part(self, name: str, index: int) -> Tensor:
        if name in self.ends:
            first, last = self.ends[name][index : index + 2]
            found = self.shard.span(name, int(first), int(last), index)
            values = np.zeros(self.shapes[name], found.dtype)
            values[: len(found)] = found
        else:
            values = self.shard.row(name, index)
        if values.dtype == np.uint16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)


def stacked_rows(rows: Sequence[list[Tensor]]) -> tuple[Tensor, ...]:
    """Stack captions' embeddings into a tensor (B,...) per part, float32 for mixed precisions."""
    parts = []
    for kind in zip(*rows, strict=True):
        alike = all(part.dtype == kind[0].dtype for part in kind)
        parts.append(torch.stack(kind if alike else [part.float() for part in kind]))
    return tuple(parts)
