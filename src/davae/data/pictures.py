"""A picture source made ready for training: sized, augmented by a draw number, split into train and held-out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used; the message is one readable line."""


class UnreadablePicture(Exception):
    """One picture that cannot be used (corrupt, truncated); the set goes on without it."""


class PictureSource(Protocol):
    """Pictures by index, with captions."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A stable name, unique in the source."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, upright."""
        ...

    def label(self, index: int) -> int | None: ...

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        """(RGB image, caption); raises UnreadablePicture."""
        ...


def held_out(key: str, share: float) -> bool:
    """Whether a picture belongs to the held-out share: a hash of its name decides, so it never moves."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


@dataclass(frozen=True)
class Split:
    train: list[int]
    held_out: list[int]


def split(source: PictureSource, share: float) -> Split:
    """Indices to train on and to hold out. One picture at least stays in training."""
    held = {i for i in range(len(source)) if held_out(source.key(i), share)}
    if len(held) == len(source):
        held.remove(min(held))
    return Split([i for i in range(len(source)) if i not in held], sorted(held))


def fit_square(image: Image.Image, resolution: int) -> Image.Image:
    """Reduce the short side to `resolution` (bicubic, antialiased), then crop the centre square.

    Raises:
        DataError: when the picture is smaller than `resolution`: davae never upsamples training data.
    """
    width, height = image.size
    if min(width, height) < resolution:
        raise DataError(f"picture is {width}x{height}, smaller than the target of {resolution} pixels")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def to_images(images: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1] -> pictures, rounded to uint8."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]


class Pictures(Dataset):
    """Items by (index, draw): the draw number seeds flip, background and caption, so a run can be repeated.

    A draw of -1 gives the plain, unaugmented picture. An unreadable picture is logged once, counted in
    `skipped`, and replaced by its successor.
    """

    def __init__(
        self, source: PictureSource, indices: list[int], resolution: int, *, seed: int = 0, flip: bool = False
    ):
        if not indices:
            raise DataError("no pictures to train on")
        self.source, self.indices, self.resolution, self.seed, self.flip = (
            source,
            indices,
            resolution,
            seed,
            flip,
        )
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, draw = item
        rng = None if draw < 0 else np.random.default_rng((self.seed, draw))
        for offset in range(len(self.indices)):
            index = self.indices[(position + offset) % len(self.indices)]
            try:
                image, caption = self.source.load(index, rng)
            except UnreadablePicture as error:
                if self.source.key(index) not in self.skipped:
                    self.skipped[self.source.key(index)] = str(error)
                    logger.warning("skipped %s: %s (%d so far)", self.source.key(index), error, len(self.skipped))
                continue
            pixels = to_tensor(fit_square(image, self.resolution))
            if rng is not None and self.flip and rng.random() < 0.5:
                pixels = pixels.flip(-1)
            return {"image": pixels, "caption": caption, "index": index, "label": self.source.label(index)}
        raise DataError(f"none of the {len(self.indices)} pictures can be read; the log names each")


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """images (B,3,H,W), captions [str], indices [int], labels [int | None]."""
    return {
        "images": torch.stack([item["image"] for item in items]),
        "captions": [item["caption"] for item in items],
        "indices": [item["index"] for item in items],
        "labels": [item["label"] for item in items],
    }


class Batches:
    """The order of training: batch number -> [(position, draw)], a pure function of the seed.

    Every epoch is a new permutation; batches run across epoch ends, so none is short. Each rank takes its
    slice of every global batch. Starting at batch k gives what an uninterrupted run would have seen.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, start: int, stop: int, rank: int = 0, ranks: int = 1
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.ranks = start, stop, rank, ranks
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def _position(self, draw: int) -> int:
        epoch, place = divmod(draw, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self.seed, epoch)).permutation(self.length),
            )
        return int(self._order[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.start, self.stop):
            first = (batch * self.ranks + self.rank) * self.batch_size
            yield [(self._position(draw), draw) for draw in range(first, first + self.batch_size)]

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def training_loader(dataset: Any, batches: Batches, *, num_workers: int, collate_fn: Any = collate) -> DataLoader:
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_fn)  # type: ignore[arg-type]
