"""The latent cache: what the frozen autoencoder and text encoders say of the training set, computed once.

A cache is a folder of safetensors shards, each written whole or not at all, by all processes together. `meta.json` comes
last: a folder without it is a cache that was interrupted, and goes on at its last whole shard.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.latent_cache.captions import ITEMS, CaptionTable
from davae.data.latent_cache.files import REMEDY, Shard, latent_shards, made_from, open_array
from davae.data.latent_cache.key import Key, changes, plain
from davae.data.latent_cache.text_rows import TextShard, stacked_rows
from davae.errors import DataError
from davae.files.atomic import atomic_text, make_folder
from davae.files.checksums import KEY, file_sum
from davae.files.ownership import LITTER
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

Condition = Literal["text", "class"]
FORMAT = 2
KEY_FILE, META, LABELS = "key.json", "meta.json", "labels.npy"
SUFFIXES = {".safetensors", ".npy", ".json"}  # of all files of a cache
NO_LABEL = -1
OPEN_SHARDS = 4096  # mapped at a time: each takes kilobytes, and the system lets a process map 65,530 pieces


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


# -- folders ---------------------------------------------------------------------------------------------------------


def replace_json(path: Path, value: Any) -> None:
    atomic_text(path, json.dumps(value))


def _changes(known: Path, key: Key) -> list[str]:
    """Return what differs between the key of a cache folder and this one; a damaged key file is one difference."""
    try:
        return changes(load_json(known.read_text(encoding="utf-8")), key)
    except (ValueError, AttributeError, TypeError):
        return [f"the damaged file {known.name}"]


def _empty(folder: Path) -> None:
    """Remove what a folder holds; the folder itself stays, which may be a symbolic link to another disk."""
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


def prepare(folder: Path, key: Key, team: Team) -> None:
    """Make a folder ready to be written: whole shards of the same key stay, everything else goes, with a word in the log."""
    if team.main:
        known = folder / KEY_FILE
        if folder.exists():
            check_cache(folder)
            if not known.is_file():
                _empty(folder)
            elif changed := _changes(known, plain(key)):
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
        replace_json(known, plain(key))
    team.wait()


def _read_values(folder: Path) -> dict[str, Any]:
    """Return what `meta.json` holds; DataError where it is damaged."""
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
    """The cache's own account of itself.

    Raises:
        DataError: no cache, an interrupted one, one of an earlier davae, or one made from something else (says what).
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
    if key is not None and (changed := changes(meta.key, plain(key))):
        raise DataError(f"cache {folder} is stale: {' and '.join(changed)} changed; delete it to make it again")
    return meta


def is_whole(folder: Path) -> bool:
    """Return whether every file of a cache is there and can be opened; a word in the log names one that is not.

    Writing the cache again then makes the faulty files anew and keeps the others.
    """
    if not (folder / META).is_file():
        return False
    try:
        meta = _read_values(folder)
        if meta.get("format") == FORMAT:
            for name, *_ in [*meta["shards"], *meta["text"]]:
                Shard(folder / name)
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
    """Declare a cache whole."""
    team = team or Team()
    if team.main:
        small = [name for name in (ITEMS, LABELS) if (folder / name).is_file()]
        meta = replace(meta, sums={name: file_sum(folder / name) for name in small})
        values = json.loads(json.dumps(asdict(meta)))
        replace_json(folder / META, {**values, KEY: _sum_of(values)})
    team.wait()
    return meta


# -- reading ---------------------------------------------------------------------------------------------------------


class ShardReader:
    """Rows of tensors that are cut into shards; a shard is mapped when it is first asked for."""

    opens: ClassVar[Any] = Shard

    def __init__(self, folder: Path, shards: Sequence[tuple[str, int]]):
        self.folder, self.files = folder, [name for name, _ in shards]
        self.starts = np.cumsum([0, *(rows for _, rows in shards)])
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # maps do not travel to workers

    def shard(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = self.opens(self.folder / self.files[number])
        self._open.move_to_end(number)
        return self._open[number]

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of the shard that holds a row, and the row's number in it."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, int(index - self.starts[number])

    def row(self, index: int, tensor: str) -> np.ndarray:
        number, row = self.place(index)
        return self.shard(number).row(tensor, row)


class TextReader(ShardReader):
    """Rows of prompt embeddings."""

    opens = TextShard

    def embeddings(self, index: int) -> list[Tensor]:
        """Return one caption's embeddings, one tensor per output of the encoder, as they are kept."""
        number, row = self.place(index)
        return self.shard(number).row(row)


class Embedded(str):
    """A caption with its embeddings, one tensor per output of the text encoders."""

    parts: list[Tensor]

    def __new__(cls, caption: str, parts: list[Tensor]) -> Embedded:
        found = super().__new__(cls, caption)
        found.parts = parts
        return found


class CachedLatents(Dataset):
    """Items of a cache by (index, draw): latent (c,h,w), and its caption or its class number.

    Start-up and memory hang on the number of shards: latents, captions and classes are read as they are asked for.

    Args:
        condition: `text` gives captions, `class` gives class numbers.
        embedded: captions come with their embeddings, as `Embedded`.

    Attributes:
        groups: (N,) the bucket of each item; items of one bucket have the same shape.

    Raises:
        DataError: the cache is not whole, or class numbers are asked for and some picture has none.
    """

    def __init__(self, folder: Path, condition: Condition = "text", *, embedded: bool = False):
        meta = read_meta(folder)
        self.meta, self.embedded = meta, embedded and bool(meta.text)
        check_sums(folder, meta)
        self.reader = ShardReader(folder, [(name, rows) for name, rows, _ in meta.shards])
        self.groups = np.repeat(
            np.asarray([group for _, _, group in meta.shards], np.int16), [rows for _, rows, _ in meta.shards]
        )
        self.kept = None  # rows of the shards, where some are left out
        if meta.unusable:
            self.kept = np.delete(np.arange(len(self.groups)), meta.unusable)
            self.groups = self.groups[self.kept]
        self.captions = CaptionTable(folder)
        self.text = TextReader(folder, meta.text)
        self.conditions: Any = self.captions  # a sequence, one an item
        if condition == "class":
            self.conditions = open_array(folder / LABELS)
            if (self.conditions == NO_LABEL).any():
                raise DataError(
                    "a class-conditional model needs a class for every picture: one sub-folder a class, `.cls` files in "
                    "the shards, or data.label_key or data.label_column"
                )

    def __len__(self) -> int:
        return self.meta.items

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, Any]:
        index = item[0] if self.kept is None else int(self.kept[item[0]])
        condition, latent = self.conditions[index], self.reader.row(index, "latents")
        if not isinstance(condition, str):
            return latent, int(condition)
        if self.embedded:
            return latent, Embedded(condition, self.text.embeddings(int(self.captions.rows[index])))
        return latent, condition

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Cached text embeddings of captions, one tensor per output of the encoder; '' is the empty caption."""
        rows = [self.text.embeddings(self.captions.row(caption)) for caption in captions]
        return tuple(part.float() for part in stacked_rows(rows))


def collate_latents(items: list[tuple[np.ndarray, Any]]) -> dict[str, Any]:
    """Make a batch: latents (B,c,h,w) float32, conditions [str] or [int], and `text` where captions come embedded.

    `text` has one tensor (B,...) per output of the encoder, as the cache keeps it: a worker hands it over in shared memory.
    """
    latents = torch.from_numpy(np.stack([latent for latent, _ in items]).astype(np.float32))
    conditions = [condition for _, condition in items]
    if not isinstance(conditions[0], Embedded):
        return {"latents": latents, "conditions": conditions}
    text = stacked_rows([condition.parts for condition in conditions])
    return {"latents": latents, "conditions": [str(condition) for condition in conditions], "text": text}
