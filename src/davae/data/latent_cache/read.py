"""Items of a latent cache, read from its shards by index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.conditions import NEEDS_CLASSES
from davae.data.latent_cache.caption_table import CaptionTable
from davae.data.latent_cache.meta import LABELS, NO_LABEL, check_sums, read_meta
from davae.data.latent_cache.shard_files import CacheShard, open_array
from davae.data.latent_cache.text_rows import TextShard, stacked_rows
from davae.errors import DataError

Condition = Literal["text", "class"]
OPEN_SHARDS = 4096  # mapped at a time: each takes kilobytes, and the system lets a process map 65,530 pieces


class ShardReader:
    """Rows of tensors that are cut into shards, of which each is mapped on first use."""

    opens: ClassVar[Any] = CacheShard

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
    """Items of a cache by (index, draw): latent (c,h,w), and its caption or class number.

    Start-up time and memory depend on the number of shards: latents, captions and classes are read one by one.

    Args:
        condition: `text` gives captions, `class` gives class numbers.
        embedded: captions come with their embeddings, as `Embedded`.

    Attributes:
        groups: (N,) the bucket of each item; items of one bucket have the same shape.

    Raises:
        DataError: the cache is not whole, or `condition` is `class` and an image has no class number.
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
                raise DataError(NEEDS_CLASSES)

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
        """Return cached embeddings of captions, one tensor per output of the encoder."""
        rows = [self.text.embeddings(self.captions.row(caption)) for caption in captions]
        return tuple(part.float() for part in stacked_rows(rows))


def collate_latents(items: list[tuple[np.ndarray, Any]]) -> dict[str, Any]:
    """Make a batch: latents (B,c,h,w) float32, conditions [str] or [int], and maybe `text`.

    `text` has one tensor (B,...) per output of the encoder, as the cache keeps it: a worker hands it over in shared memory.
    """
    latents = torch.from_numpy(np.stack([latent for latent, _ in items]).astype(np.float32))
    conditions = [condition for _, condition in items]
    if not isinstance(conditions[0], Embedded):
        return {"latents": latents, "conditions": conditions}
    text = stacked_rows([condition.parts for condition in conditions])
    return {"latents": latents, "conditions": [str(condition) for condition in conditions], "text": text}


class PairedLatents(Dataset):
    """Latents (c,h,w) and (C,h',w') of two autoencoders, by (index, draw), of the same draw.

    Both caches were written from one `ImageDataset` in one order, so that an index means the same crop and flip in both.

    Attributes:
        groups: (N,) the bucket of each item.

    Raises:
        DataError: one of them is not whole, or they hold other images.
    """

    def __init__(self, folder: Path, base_folder: Path):
        self.own, self.base = CachedLatents(folder), CachedLatents(base_folder)
        own, base = self.own.meta, self.base.meta
        if own.shards != base.shards or own.skipped.keys() != base.skipped.keys():
            raise DataError(f"{base_folder} holds other images than {folder}; delete both to make them again")
        self.groups = self.own.groups

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return self.own[item][0], self.base[item][0]


def collate_pairs(items: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Return latents (B,c,h,w) and base_latents (B,C,h',w'), float32."""
    own, base = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*items, strict=True))
    return {"latents": own, "base_latents": base}
