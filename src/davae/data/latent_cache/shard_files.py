"""Files of a latent cache, written whole and read with their checksums."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from davae.data.latent_cache.key import hash_values, plain_key
from davae.errors import DataError
from davae.files.atomic import atomic_file
from davae.files.checksums import SUFFIX, array_sum, row_sums

logger = logging.getLogger(__name__)

REMEDY = "delete this file and run the same command again, which makes it anew"


def save_shard(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, rows: tuple[str, ...] = ()
) -> None:
    """Write one shard whole or not at all, with checksums.

    Args:
        rows: tensors that are read row by row; each gets a checksum per row, the others one each.
    """
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    sums = {  # tensors, not metadata, whose order differs from file to file: equal contents make equal files
        f"{name}{SUFFIX}": row_sums(array) if name in rows else np.asarray(array_sum(array), np.uint32)
        for name, array in whole.items()
        if not name.endswith(SUFFIX) and f"{name}{SUFFIX}" not in whole  # given, of rows that are not an axis
    }
    with atomic_file(path) as partial:
        save_file({**whole, **sums}, partial, metadata)


def latent_name(group: int, number: int) -> str:
    """Return the file name of a shard of one bucket."""
    return f"latents-{group:03d}-{number:05d}.safetensors"


def latent_shards(folder: Path) -> list[Path]:
    """Return the shards of latents in a cache, in their order."""
    return sorted(folder.glob("latents-*.safetensors"))


def shard_key(key: Mapping[str, Any]) -> np.ndarray:
    """Return the short form of a cache's key that each of its shards holds."""
    return np.frombuffer(hash_values(plain_key(key)).encode(), np.uint8)


def made_from(path: Path, key: Mapping[str, Any]) -> bool:
    """Return whether a shard can be opened and was written for this key, or holds none."""
    try:
        shard = CacheShard(path)
        return "key" not in shard.names or np.array_equal(shard.tensor("key"), shard_key(key))
    except DataError:
        return False


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file whole or not at all."""
    with atomic_file(path) as partial:
        np.save(partial, values)


def open_array(path: Path) -> np.ndarray:
    """Map an .npy file of a cache.

    Raises:
        DataError: the file is gone, cut or damaged.
    """
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise DataError(f"cache file {path} is gone; run the same command again, which makes it anew") from error
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"cache file {path} is cut or damaged; {REMEDY}") from error


class CacheShard:
    """One open shard, of which everything that is read is compared with its checksums.

    Attributes:
        names: its tensors, without those that hold checksums.
        metadata: of the file.

    Raises:
        DataError: the file is gone, cut, or not what was written.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise DataError(f"cache shard {path} is gone; run the same command again, which makes it anew")
        try:
            self.file: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise DataError(f"cache shard {path} is cut or damaged; {REMEDY}") from error
        everything = set(self.file.keys())
        self.names = sorted(name for name in everything if not name.endswith(SUFFIX))
        self.metadata: dict[str, str] = self.file.metadata() or {}
        self._summed = {name for name in self.names if f"{name}{SUFFIX}" in everything}
        self._sums: dict[str, np.ndarray] = {}  # () of a whole tensor, (N,) of its rows; read on first use

    def sums(self, name: str) -> np.ndarray | None:
        """Return the checksum of a tensor, (), or of its rows, (N,), or None of earlier versions."""
        if name in self._summed and name not in self._sums:
            self._sums[name] = self.file.get_tensor(f"{name}{SUFFIX}")
        return self._sums.get(name)

    def tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor after comparing it with its checksum."""
        values, sums = self.file.get_tensor(name), self.sums(name)
        if sums is not None and not np.array_equal(sums, row_sums(values) if sums.ndim else array_sum(values)):
            raise DataError(
                f"cache shard {self.path}: '{name}' is not what was written (its checksum differs); {REMEDY}"
            )
        return values

    def row(self, name: str, index: int) -> np.ndarray:
        """Return one row of a tensor, compared with its checksum."""
        return self._checked_row(name, index, self.file.get_slice(name)[index])

    def span(self, name: str, first: int, last: int, index: int) -> np.ndarray:
        """Return entries first..last-1 of a tensor after comparing them with the sum of row `index`."""
        return self._checked_row(name, index, self.file.get_slice(name)[first:last])

    def _checked_row(self, name: str, index: int, values: np.ndarray) -> np.ndarray:
        sums = self.sums(name)
        if sums is not None and array_sum(values) != sums[index]:
            raise DataError(
                f"cache shard {self.path}: row {index} of '{name}' is not what was written (its checksum differs); {REMEDY}"
            )
        return values

    def check(self) -> None:
        """Compare every tensor that has one checksum for all of it: all but latents and embeddings."""
        for name in self.names:
            sums = self.sums(name)
            if sums is not None and not sums.ndim:
                self.tensor(name)


def is_sound_shard(path: Path) -> bool:
    """Return whether a shard can be opened with its small tensors sound, and log a fault."""
    try:
        CacheShard(path).check()
    except DataError as error:
        if path.is_file():
            logger.warning("%s", error)
        return False
    return True
