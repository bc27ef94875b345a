"""Sizes of a source's images, read from their headers once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from davae.data.decoding import disk_fault
from davae.data.equal_files import FileImages, equal_images
from davae.data.images import ImageSource
from davae.errors import RunError, UnreadableImage
from davae.files.atomic import atomic_file
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of chosen images, as they are after decoding.

    Attributes:
        pixels: (N,2) int32, (width, height) of each; 0 where its header cannot be read.
        reasons: place -> why it cannot be used.
        equal: place of an image whose file comes a second time -> place of the first one; none of an older file of sizes.
    """

    pixels: np.ndarray
    reasons: dict[int, str]
    equal: dict[int, int] = field(default_factory=dict)


def measure_sizes(source: ImageSource, indices: Sequence[int]) -> ImageSizes:
    """Read the header of each chosen image, and find images with equal files.

    Args:
        source: the images.
        indices: the chosen ones.

    Raises:
        DataError: a fault of the disk, which names the image.
    """
    pixels = np.zeros((len(indices), 2), np.int32)
    reasons: dict[int, str] = {}
    for place, index in enumerate(indices):
        try:
            pixels[place] = source.size(index)
        except UnreadableImage as error:
            reasons[place] = str(error)
        except OSError as error:
            raise disk_fault(source.key(index), error) from error
    return ImageSizes(
        pixels, reasons, equal_images(source, indices, reasons) if isinstance(source, FileImages) else {}
    )


def sizes_key(source: ImageSource, indices: Sequence[int], options: str) -> str:
    """Return a hash of the chosen images' names and stamps, and of options that refuse some."""
    digest = hashlib.sha256(f"{FORMAT} {options}".encode())
    for index in indices:
        digest.update(source.key(index).encode("utf-8", "surrogateescape") + b"\0" + source.stamp(index) + b"\0")
    return digest.hexdigest()[:16]


def load_sizes(folder: Path, key: str, count: int) -> ImageSizes | None:
    """Return the sizes that a folder keeps under a key, None for missing or damaged ones.

    Args:
        folder: where the sizes are kept.
        key: of `sizes_key`.
        count: number of images that the file must have.
    """
    path = folder / f"survey-{key}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            pixels, reasons = file["pixels"], load_json(file["reasons"].tobytes())
            equal = file["equal"].tolist() if "equal" in file else []
            found = ImageSizes(pixels, {int(place): reason for place, reason in reasons.items()}, dict(equal))
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s): the sizes are measured again", path, error)
        return None
    return found if pixels.shape == (count, 2) else None


def keep_sizes(folder: Path, key: str, sizes: ImageSizes) -> None:
    """Write sizes for the next start, or log why they cannot be written."""
    path = folder / f"survey-{key}.npz"
    if path.is_file():
        return
    text = np.frombuffer(json.dumps(sizes.reasons).encode(), np.uint8)
    equal = np.asarray(list(sizes.equal.items()), np.int64).reshape(-1, 2)
    try:
        with atomic_file(path) as partial, partial.open("wb") as stream:
            np.savez(stream, pixels=sizes.pixels, reasons=text, equal=equal)
    except RunError as error:
        logger.warning("%s; the next start measures the sizes again", error)
