"""Folder of a latent cache: its key, its meta data, and whether it is whole.

A cache is a folder of safetensors shards, each written whole or not at all, by all processes together. `meta.json` comes
last: a folder without it is a cache that was interrupted, and goes on at its last whole shard.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from davae.data.latent_cache.caption_table import ITEMS, CaptionTable
from davae.data.latent_cache.key import Key, changes, plain_key
from davae.data.latent_cache.shard_files import REMEDY, CacheShard, latent_shards, made_from, open_array
from davae.errors import DataError
from davae.files.atomic import atomic_text, make_folder
from davae.files.checksums import KEY, file_sum
from davae.files.ownership import LITTER
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

FORMAT = 2
KEY_FILE, META, LABELS = "key.json", "meta.json", "labels.npy"
SUFFIXES = {".safetensors", ".npy", ".json"}  # of all files of a cache
NO_LABEL = -1


@dataclass(frozen=True)
class Team:
    """The processes that write one cache together."""

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class CacheMeta:
    """Content of `meta.json`.

    Attributes:
        items: rows of the shards that a training takes.
        shards: (file, rows, bucket) of each shard; text: (file, rows).
        skipped: unusable images, and why.
        unusable: rows of the shards that no training takes.
        sums: CRC-32 of the files that hold the class and the caption's number of every item.
    """

    key: dict[str, Any]
    items: int
    mean: list[float]
    std: list[float]
    shards: list[tuple[str, int, int]] = field(default_factory=list)
    text: list[tuple[str, int]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unusable: list[int] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


def replace_json(path: Path, value: Any) -> None:
    atomic_text(path, json.dumps(value))


def _changes(known: Path, key: Key) -> list[str]:
    """Return the differences of a cache folder's key and this one, or the damaged key file."""
    try:
        return changes(load_json(known.read_text(encoding="utf-8")), key)
    except (ValueError, AttributeError, TypeError):
        return [f"the damaged file {known.name}"]


def _empty(folder: Path) -> None:
    """Remove the content of a folder, which itself may be a symbolic link and stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_cache(folder: Path) -> None:
    """Refuse to empty a folder that holds anything but a cache's files.

    Raises:
        DataError: names the first other file.
    """
    for path in sorted(folder.iterdir()):
        ours = path.suffix in SUFFIXES and path.is_file() and not path.is_symlink()
        if not ours and path.name not in LITTER:
            raise DataError(f"{folder}: it holds {path.name!r}, which davae did not write; move it away")


def prepare_cache(folder: Path, key: Key, team: Team) -> None:
    """Make a folder ready for a cache, in which only whole shards of this key stay.

    Args:
        folder: of the cache; need not exist.
        key: hashes of what the cache is made from.
        team: the processes that write it.
    """
    if team.main:
        known = folder / KEY_FILE
        if folder.exists():
            check_cache(folder)
            if not known.is_file():
                _empty(folder)
            elif changed := _changes(known, plain_key(key)):
                logger.warning("cache %s is made again: %s changed", folder, " and ".join(changed))
                _empty(folder)
        make_folder(folder)
        (folder / META).unlink(missing_ok=True)
        for shard in latent_shards(folder):
            if not made_from(shard, key):
                logger.warning("cache: %s was made from other data; it is made again", shard)
                shard.unlink()
        for leftover in folder.glob(".*"):
            leftover.unlink()
        replace_json(known, plain_key(key))
    team.wait()


def _read_values(folder: Path) -> dict[str, Any]:
    """Return the content of `meta.json`, or raise a DataError for a damaged one."""
    path = folder / META
    try:
        values = load_json(path.read_text(encoding="utf-8"))
        expected = values.pop(KEY, None)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"cache file {path} is damaged; {REMEDY}") from error
    if expected is not None and _sum_of(values) != expected:
        raise DataError(f"cache file {path} is not what was written (its checksum differs); {REMEDY}")
    return values


def _sum_of(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_meta(folder: Path, key: Key | None = None) -> CacheMeta:
    """Return a cache's meta data.

    Args:
        folder: of the cache.
        key: what the cache must be made from; None accepts any.

    Raises:
        DataError: no cache, an interrupted one, one of an earlier davae, or one made from something else, which is named.
    """
    if not (folder / META).is_file():
        raise DataError(f"{folder} holds no whole latent cache; make one with `davae cache-latents`")
    values = _read_values(folder)
    if values.get("format") != FORMAT:
        raise DataError(f"cache {folder} was written by an earlier davae; delete it to make it again")
    try:
        meta = CacheMeta(**values)
    except TypeError as error:
        raise DataError(f"cache file {folder / META} is damaged ({error}); {REMEDY}") from error
    if key is not None and (changed := changes(meta.key, plain_key(key))):
        raise DataError(f"cache {folder} is stale: {' and '.join(changed)} changed; delete it to make it again")
    return meta


def is_whole(folder: Path) -> bool:
    """Return whether every file of a cache can be opened, and log one that cannot.

    Writing the cache again then makes the faulty files anew and keeps the others.
    """
    if not (folder / META).is_file():
        return False
    try:
        meta = _read_values(folder)
        if meta.get("format") == FORMAT:
            for name, *_ in [*meta["shards"], *meta["text"]]:
                CacheShard(folder / name)
            CaptionTable(folder)
            open_array(folder / LABELS)
            check_sums(folder, CacheMeta(**meta))
    except (DataError, KeyError, TypeError) as error:
        logger.warning("cache %s is not whole: %s", folder, error)
        return False
    return True


def check_sums(folder: Path, meta: CacheMeta) -> None:
    """Compare the small files of a cache with the meta.

    Raises:
        DataError: one is not what was written.
    """
    for name, expected in meta.sums.items():
        open_array(folder / name)
        if file_sum(folder / name) != expected:
            raise DataError(f"cache file {folder / name} is not what was written (its checksum differs); {REMEDY}")


def seal(folder: Path, meta: CacheMeta, team: Team | None = None) -> CacheMeta:
    """Declare a cache whole.

    Args:
        folder: of the cache.
        meta: content of its `meta.json`.
        team: the processes that wrote it.
    """
    team = team or Team()
    if team.main:
        small = [name for name in (ITEMS, LABELS) if (folder / name).is_file()]
        meta = replace(meta, sums={name: file_sum(folder / name) for name in small})
        values = json.loads(json.dumps(asdict(meta)))
        replace_json(folder / META, {**values, KEY: _sum_of(values)})
    team.wait()
    return meta
