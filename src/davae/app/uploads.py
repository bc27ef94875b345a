"""Bounds of what a visitor may send, and one line for everything beyond them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from davae.app.decoding import decode_apart
from davae.app.limits import is_below
from davae.data.decoding import fault_of_one
from davae.data.formats import is_image_name
from davae.errors import DataError, UnreadableImage

MAX_BYTES = 20 * 2**20  # of one file
MAX_SIDE = 12_000  # pixels
MAX_PIXELS = 40_000_000
MAX_IMAGES = 500  # of one training set
MAX_PROMPT = 500  # characters
MAX_STEPS = 150  # of one image
MAX_TRAINING_STEPS = 200_000
MAX_SECONDS = 600  # of one drawing, without the wait
FEW = 5  # names that a line repeats

_BOUND = f"{MAX_SIDE:,} a side and {MAX_PIXELS // 1_000_000} million in all"


def read_upload(path: Path) -> Image.Image:
    """Return an uploaded image as upright sRGB, after a check of the size in its header.

    Raises:
        DataError: too many bytes or pixels, or not an image that can be read, in one line with the file's name.
    """
    name = shown_name(path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise DataError(f"{name} cannot be read; upload it again") from error
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size / 2**20:.0f} MiB; the page takes files up to {MAX_BYTES // 2**20} MiB")
    try:
        return decode_apart(content, MAX_SIDE, MAX_PIXELS)
    except UnreadableImage as error:
        found, fault = str(error), fault_of_one(error)
    if size_found := re.fullmatch(r"too large: (\d+x\d+)", found):
        raise DataError(f"{name} is {size_found[1]}, more pixels than the page takes: {_BOUND}")
    if found.startswith("too many pixels"):
        raise DataError(f"{name} has more pixels than the page takes: {_BOUND}")
    if found.startswith(("not an image:", "empty file")):
        raise DataError(f"{name} is not an image that can be read; use PNG, JPEG, WebP, BMP, TIFF or GIF")
    raise DataError(f"{name}: {fault}")


def shown_name(path: Path) -> str:
    """Return the name of an uploaded file, cut, without characters that do not print."""
    name = "".join(letter if letter.isprintable() else "?" for letter in path.name)
    return name if len(name) <= 80 else f"{name[:77]}..."


def uploaded(paths: list[str], folder: Path) -> list[Path]:
    """Return the paths that a request names as uploads.

    Args:
        paths: from the request.
        folder: of uploads.

    Raises:
        DataError: one that does not lie in the folder of uploads, whose name is not repeated.
    """
    if not all(is_below(path, folder) for path in paths):
        raise DataError("one of the files was not uploaded here; upload it again")
    return [Path(path) for path in paths]


def named(names: Sequence[str], count: int) -> str:
    """Return the first FEW names of files, and how many follow.

    Args:
        names: at least the first ones.
        count: of all.
    """
    first = names[:FEW]
    return ", ".join(first) + (f" and {count - len(first)} more" if count > len(first) else "")


def unused_captions(uploads: list[Path]) -> list[str]:
    """Return the names of `.txt` files without an uploaded image of the same name."""
    images = {path.stem for path in uploads if path.suffix.lower() != ".txt"}
    return [shown_name(path) for path in uploads if path.suffix.lower() == ".txt" and path.stem not in images]


def store_images(uploads: list[Path], folder: Path) -> int:
    """Copy uploaded images and their `.txt` captions into a folder.

    All are checked before the first is written.

    Args:
        uploads: images and captions.
        folder: to write to.

    Returns:
        The number of images.

    Raises:
        DataError: one of them cannot be used, there are too many, or there is none.
    """
    captions = {path.stem: path for path in uploads if path.suffix.lower() == ".txt"}
    images = [path for path in uploads if path.suffix.lower() != ".txt"]
    if not images:
        raise DataError("no images were uploaded")
    if len(images) > MAX_IMAGES:
        raise DataError(f"{len(images)} images; the page takes up to {MAX_IMAGES}: put them below --data-root")
    for path in images:
        if not is_image_name(path.name):
            raise DataError(
                f"{shown_name(path)} is not an image that can be trained on; use PNG, JPEG, WebP, BMP, TIFF or GIF"
            )
        read_upload(path)
    if any(path.stat().st_size > 10_000 for path in captions.values()):
        raise DataError("a caption file has more than 10,000 bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(images):
        words = "-".join(re.findall(r"[a-z0-9]+", path.stem.lower()))[:40]
        name = f"{number:03d}-{words}" if words else f"{number:03d}"
        shutil.copyfile(path, folder / f"{name}{path.suffix.lower()}")
        if path.stem in captions:
            shutil.copyfile(captions[path.stem], folder / f"{name}.txt")
    return len(images)
