"""The latent cache: what the frozen autoencoder and text encoders say of the training set, computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.pictures import DataError, Pictures, collate

Condition = Literal["text", "class"]


class ChannelStatistics:
    """Mean and variance per channel over any number of batches, in float64 (Chan's merge)."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """latents (B,c,h,w)."""
        values = latents.detach().double().cpu().transpose(0, 1).flatten(1)  # (c, B*h*w)
        count, mean = values.shape[1], values.mean(1)
        delta, total = mean - self.mean, self.count + count
        self.squares += (values - mean[:, None]).square().sum(1) + delta.square() * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / max(1, self.count)).sqrt()


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values: what a cache was made from."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class CacheMeta:
    key: str
    items: int
    mean: list[float]
    std: list[float]


def write_latents(
    folder: Path,
    pictures: Pictures,
    encode: Callable[[Tensor], Tensor],
    *,
    key: str,
    variants: int,
    batch_size: int,
    dtype: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> CacheMeta:
    """Encode every picture `variants` times (other flip, background, caption) into `latents.npy` + `captions.json`,
    and `labels.npy` where every picture has a class.

    Args:
        encode: images (B,3,H,W) in [-1,1] -> latents (B,c,h,w).
        key: fingerprint of everything that determines the content; a reader compares it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = [(i, i + v * len(pictures)) for v in range(variants) for i in range(len(pictures))]
    latents: np.memmap | None = None
    statistics: ChannelStatistics | None = None
    captions: list[str] = []
    labels: list[int | None] = []
    for start in range(0, len(order), batch_size):
        batch = collate([pictures[item] for item in order[start : start + batch_size]])
        encoded = encode(batch["images"])
        if latents is None or statistics is None:
            shape = (len(order), *encoded.shape[1:])
            latents = np.lib.format.open_memmap(folder / "latents.npy", mode="w+", dtype=dtype, shape=shape)
            statistics = ChannelStatistics(encoded.shape[1])
        latents[start : start + len(encoded)] = encoded.float().cpu().numpy()
        statistics.update(encoded)
        captions += batch["captions"]
        labels += batch["labels"]
        on_batch(start + len(encoded), len(order))
    assert latents is not None
    assert statistics is not None
    latents.flush()
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    if None not in labels:
        np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    meta = CacheMeta(key, len(order), statistics.mean.tolist(), statistics.std.tolist())
    (folder / "meta.json").write_text(json.dumps(meta.__dict__), encoding="utf-8")
    return meta


def read_meta(folder: Path, key: str) -> CacheMeta:
    """Raises DataError when there is no cache, or one made from something else."""
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no latent cache; make one with `davae cache-latents`")
    meta = CacheMeta(**json.loads(path.read_text(encoding="utf-8")))
    if meta.key != key:
        raise DataError(f"cache {folder} was made from another autoencoder or data; delete it to make it again")
    return meta


def write_text(
    folder: Path,
    captions: list[str],
    encode: Callable[[list[str]], tuple[Tensor, ...]],
    *,
    batch_size: int,
    dtype: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Embed each distinct caption once, the empty one first: `text_0.npy`, `text_1.npy`, ... and `text.json`."""
    distinct = ["", *sorted(set(captions) - {""})]
    arrays: list[np.memmap] = []
    for start in range(0, len(distinct), batch_size):
        parts = encode(distinct[start : start + batch_size])
        if not arrays:
            arrays = [
                np.lib.format.open_memmap(
                    folder / f"text_{n}.npy", mode="w+", dtype=dtype, shape=(len(distinct), *part.shape[1:])
                )
                for n, part in enumerate(parts)
            ]
        for array, part in zip(arrays, parts, strict=True):
            array[start : start + len(part)] = part.float().cpu().numpy()
        on_batch(start + len(parts[0]), len(distinct))
    for array in arrays:
        array.flush()
    (folder / "text.json").write_text(json.dumps(distinct), encoding="utf-8")


class CachedLatents(Dataset):
    """Items of a cache by (index, draw): latent (c,h,w), and its caption or its class number.

    Args:
        condition: `text` gives captions, `class` gives class numbers.

    Raises:
        DataError: class numbers are asked for and some picture has none.
    """

    def __init__(self, folder: Path, condition: Condition = "text"):
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.captions: list[str] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.conditions: list[Any] = self.captions
        if condition == "class":
            if not (folder / "labels.npy").is_file():
                raise DataError(
                    "a class-conditional model needs a class for every picture: one sub-folder a class, or `.cls` files "
                    "in the shards"
                )
            self.conditions = np.load(folder / "labels.npy").tolist()
        self.text = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("text_*.npy"))]
        distinct = json.loads((folder / "text.json").read_text(encoding="utf-8")) if self.text else []
        self.number = {caption: n for n, caption in enumerate(distinct)}

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, Any]:
        index, _ = item
        return self.latents[index], self.conditions[index]

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Cached text embeddings of captions, one tensor per output of the encoder; '' is the empty caption."""
        rows = [self.number[caption] for caption in captions]
        return tuple(torch.from_numpy(np.asarray(array[rows], dtype=np.float32)) for array in self.text)


def collate_latents(items: list[tuple[np.ndarray, Any]]) -> dict[str, Any]:
    """latents (B,c,h,w) float32, conditions [str] or [int]."""
    latents = torch.from_numpy(np.stack([latent for latent, _ in items]).astype(np.float32))
    return {"latents": latents, "conditions": [condition for _, condition in items]}
