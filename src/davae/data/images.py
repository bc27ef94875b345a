"""Images made ready for training: sized, augmented by a draw number, split in two parts."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.decoding import DiskFault, disk_fault
from davae.data.findings import Findings
from davae.errors import DataError, UnreadableImage

logger = logging.getLogger(__name__)


def by_kind(skipped: dict[str, str]) -> dict[str, list[str]]:
    """Return the names of left-out images by the kind of fault, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for name, reason in sorted(skipped.items()):
        kinds.setdefault(reason.partition(": ")[0], []).append(name)
    return dict(sorted(kinds.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def summarise_skipped(skipped: dict[str, str]) -> str:
    """Return '12 left out: 10 truncated (a.jpg, b.jpg, ...), 2 empty file (c.jpg, d.jpg)'."""
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in by_kind(skipped).items()
    ]
    return f"{len(skipped)} left out: {', '.join(parts)}"


class ImageSource(Protocol):
    """Images by index, with captions."""

    @property
    def findings(self) -> Findings:
        """Layout, unused files, duplicates, and repaired captions as far as they are read."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return a stable name, unique in the source."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) in pixels, upright, from the header, or raise UnreadableImage."""
        ...

    def identity(self, index: int) -> bytes:
        """Return bytes that change with the image's file or its captions, without reading pixels."""
        ...

    def stamp(self, index: int) -> bytes:
        """Return bytes that change when the image's file is replaced, without opening it."""
        ...

    def label(self, index: int) -> int | None: ...

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        """Return the caption that `load` returns for the same draw, without decoding pixels."""
        ...

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        """Return (RGB image, caption), or raise UnreadableImage."""
        ...


def held_out(key: str, share: float) -> bool:
    """Return whether an image belongs to the held-out share, by a hash of its name."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


@dataclass(frozen=True)
class Split:
    train: list[int]
    held_out: list[int]


def split(source: ImageSource, share: float, indices: Sequence[int] | None = None) -> Split:
    """Split images into those to train on and those to hold out. At least one stays in training.

    Args:
        source: the images.
        share: share to hold out; a hash of each name decides.
        indices: the images to split, in order; None takes all.
    """
    indices = range(len(source)) if indices is None else indices
    held = [i for i in indices if held_out(source.key(i), share)] if share > 0 else []
    if not held:
        return Split(list(indices), [])
    if len(held) == len(indices):
        held = held[1:]
    without = set(held)
    return Split([i for i in indices if i not in without], held)


def spread_indices(count: int, num: int | None) -> Sequence[int]:
    """Return `num` of `count` places, spread over all of them, in order.

    They are the first `num` of one seeded permutation: every process gets the same ones, and a smaller choice is part of a
    larger one.

    Args:
        count: number of places.
        num: number to choose; None takes all.
    """
    if num is None or num >= count:
        return range(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:num]).tolist()


def fit(image: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Reduce an image (bicubic, antialiased) to cover width x height, and cut the rest off.

    Args:
        place: where the part that stays lies, from 0 (left, top) over 0.5 (centre) to 1.

    Raises:
        DataError: the image is smaller: davae never upsamples training data.
    """
    own_width, own_height = image.size
    if own_width < width or own_height < height:
        raise DataError(f"image is {own_width}x{own_height}, smaller than the target of {target_name(width, height)}")
    scale = max(width / own_width, height / own_height)
    across, down = min(width / scale, own_width), min(height / scale, own_height)
    left, top = int((own_width - across) * place[0]), int((own_height - down) * place[1])
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))


def target_name(width: int, height: int) -> str:
    return f"{width} pixels" if width == height else f"{width}x{height} pixels"


def fit_square(image: Image.Image, resolution: int) -> Image.Image:
    """Return the centre square by `fit`."""
    return fit(image, resolution, resolution)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as (3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def to_images(images: Tensor) -> list[Image.Image]:
    """Return (B,3,H,W) in [-1,1] as images, rounded to uint8."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]


def grid(images: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Return images of equal size in rows on white.

    Args:
        images: of one size.
        columns: images in a row.
        gap: pixels between images.
    """
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet


class ImageDataset(Dataset):
    """Items by (position, draw), where the draw seeds crop, flip, background and caption.

    A draw of -1 gives the plain, unaugmented image. An unreadable image is logged once, kept in `skipped` with the
    reason, and replaced by the next one of its bucket.

    Args:
        indices: the source's images to use.
        resolution: side of the square, pixels.
        crop: where an image of another aspect ratio is cut; `random` by the draw.
        sizes, groups: buckets, (width, height) each, and the bucket of every image; without them all are squares.
        enlarge: prepare images as ADM does, which enlarges small ones.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        resolution: int,
        *,
        seed: int = 0,
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        sizes: Sequence[tuple[int, int]] = (),
        groups: np.ndarray | None = None,
        enlarge: bool = False,
    ):
        if not len(indices):
            raise DataError("no images to train on")
        self.source, self.indices, self.resolution = source, indices, resolution
        self.seed, self.flip, self.crop = seed, flip, crop
        self.sizes = list(sizes) or [(resolution, resolution)]
        self.groups = np.zeros(len(indices), np.int16) if groups is None else groups
        self.enlarge, self.enumerates = enlarge, False
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def enumerating(self) -> ImageDataset:
        """Return the same images for a cache, where draw v * len + position is variant v.

        So each image is kept in both orientations, however often it is drawn. What is skipped is kept in common.
        """
        same = copy.copy(self)
        same.enumerates = True
        return same

    def read(self, position: int, draw: int) -> dict[str, Any]:
        """Read one image.

        Args:
            position: place in `indices`.
            draw: number of the draw.

        Returns:
            image (3,H,W) in [-1,1], caption, index, label.

        Raises:
            UnreadableImage: it cannot be used.
            DataError: a fault of the disk, which names the image.
        """
        index = self.indices[position]
        rng = None if draw < 0 else np.random.default_rng((self.seed, draw))
        try:
            image, caption = self.source.load(index, rng)
            label = self.source.label(index)
        except OSError as error:
            raise disk_fault(self.source.key(index), error) from error
        width, height = self.sizes[self.groups[position]]
        small = image.width < width or image.height < height
        if small and not self.enlarge:
            raise UnreadableImage("too small", f"{image.width}x{image.height}, which its header did not say")
        place = (0.5, 0.5)
        if rng is not None and self.crop == "random":
            place = (float(rng.random()), float(rng.random()))
        pixels = to_tensor((adm_crop if self.enlarge else fit)(image, width, height, place))
        if rng is not None and self.flip:
            mirrored = draw // len(self) % 2 == 1 if self.enumerates else rng.random() < 0.5
            pixels = pixels.flip(-1) if mirrored else pixels
        return {"image": pixels, "caption": caption, "index": index, "label": label}

    def skip(self, position: int, error: UnreadableImage) -> str:
        """Keep and log, once, why an image is not used, and return its name."""
        name = self.source.key(self.indices[position])
        if name not in self.skipped:
            self.skipped[name] = str(error)
            logger.warning("skipped %s: %s (%d so far)", name, error, len(self.skipped))
        return name

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Return an item with `skipped`, the images that this call left out."""
        position, draw = item
        met: dict[str, str] = {}
        for offset in range(len(self.indices)):
            place = (position + offset) % len(self.indices)
            if self.groups[place] != self.groups[position]:
                continue
            name = self.source.key(self.indices[place])
            if name in self.skipped:
                continue
            try:
                return {**self.read(place, draw), "skipped": met}
            except UnreadableImage as error:
                self.skip(place, error)
                met[name] = self.skipped[name]
            except DiskFault as error:  # the next draw tries it again
                logger.warning("%s; another image takes its place", error)
        raise DataError(f"none of the {len(self.indices)} images can be read; the log names each")


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return images (B,3,H,W), captions, indices, labels (int or None), skipped name -> reason."""
    return {
        "images": torch.stack([item["image"] for item in items]),
        "captions": [item["caption"] for item in items],
        "indices": [item["index"] for item in items],
        "labels": [item["label"] for item in items],
        "skipped": {name: reason for item in items for name, reason in item.get("skipped", {}).items()},
    }


def adm_crop(image: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize an image in ADM's steps to cover width x height, and cut the rest off.

    Source: `center_crop_arr` of guided-diffusion (github.com/openai/guided-diffusion, `image_datasets.py`; arXiv
    2105.05233). Halve with a box filter while both sides stay at least twice the target, resize with a bicubic filter to
    rounded sizes, crop. A square target at the default place gives ADM's pixels exactly.

    Args:
        image: RGB image of any size; smaller ones are enlarged.
        width, height: target, pixels.
        place: position of the crop, from 0 (left, top) over 0.5 (centre) to 1.

    Returns:
        The image, width x height.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int((size[0] - width) * place[0]), int((size[1] - height) * place[1])
    return image.crop((left, top, left + width, top + height))
