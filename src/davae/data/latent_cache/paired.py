"""Two latent caches of the same pictures, read side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from davae.data.latent_cache.read import CachedLatents
from davae.errors import DataError


class PairedLatents(Dataset):
    """What two autoencoders say of each picture, by (index, draw): latents (c,h,w) and (C,h',w') of the same draw.

    Both caches were written from one `ImageDataset` in one order, so that an index means the same crop and flip in both.

    Attributes:
        groups: (N,) the bucket of each item.

    Raises:
        DataError: one of them is not whole, or they hold other pictures.
    """

    def __init__(self, folder: Path, base_folder: Path):
        self.own, self.base = CachedLatents(folder), CachedLatents(base_folder)
        own, base = self.own.meta, self.base.meta
        if own.shards != base.shards or own.skipped.keys() != base.skipped.keys():
            raise DataError(f"{base_folder} holds other pictures than {folder}; delete both to make them again")
        self.groups = self.own.groups

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return self.own[item][0], self.base[item][0]


def collate_pairs(items: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """latents (B,c,h,w) and base_latents (B,C,h',w'), float32."""
    own, base = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*items, strict=True))
    return {"latents": own, "base_latents": base}
