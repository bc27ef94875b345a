"""What a stranger may send: one place with every bound, and one line for everything beyond it."""

from __future__ import annotations

import io
import re
import shutil
import warnings
from pathlib import Path

from PIL import Image

from davae.data.decoding import DAMAGE, decode
from davae.data.formats import is_image_name, open_image
from davae.data.pictures import DataError, UnreadablePicture

MAX_BYTES = 20 * 2**20  # of one file
MAX_SIDE = 12_000  # pixels
MAX_PIXELS = 40_000_000
MAX_PICTURES = 500  # of one training set
MAX_PROMPT = 500  # characters
MAX_STEPS = 150  # of one picture
MAX_TRAINING_STEPS = 200_000

_BOUND = f"{MAX_SIDE:,} a side and {MAX_PIXELS // 1_000_000} million in all"


def read_picture(path: Path) -> Image.Image:
    """An uploaded picture as upright sRGB, read only after its header was found within bounds.

    Raises:
        DataError: too many bytes or pixels, or no picture that can be read, in one line with the file's name.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(
            f"{path.name} has {size / 2**20:.0f} MiB; the page takes files up to {MAX_BYTES // 2**20} MiB"
        )
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_image(io.BytesIO(content)) as picture:  # reads the header alone
                width, height = picture.size
    except Image.DecompressionBombError:
        raise DataError(f"{path.name} has more pixels than the page takes: {_BOUND}") from None
    except UnreadablePicture as error:
        raise DataError(f"{path.name}: {error}") from error
    except DAMAGE as error:
        raise DataError(
            f"{path.name} is no picture that can be read; use PNG, JPEG, WebP, BMP, TIFF or GIF"
        ) from error
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(f"{path.name} is {width}x{height}, more pixels than the page takes: {_BOUND}")
    try:
        return decode(io.BytesIO(content), "white")
    except UnreadablePicture as error:
        raise DataError(f"{path.name}: {error}") from error


def store_pictures(uploads: list[Path], folder: Path) -> int:
    """Copy uploaded pictures and the `.txt` captions beside them into `folder`; returns how many pictures.

    All are checked before the first is written.

    Raises:
        DataError: one of them cannot be used, there are too many, or there is none.
    """
    captions = {path.stem: path for path in uploads if path.suffix.lower() == ".txt"}
    pictures = [path for path in uploads if path.suffix.lower() != ".txt"]
    if not pictures:
        raise DataError("no pictures were uploaded")
    if len(pictures) > MAX_PICTURES:
        raise DataError(f"{len(pictures)} pictures; the page takes up to {MAX_PICTURES}: name a folder instead")
    for path in pictures:
        if not is_image_name(path.name):
            raise DataError(
                f"{path.name} is no picture that can be trained on; use PNG, JPEG, WebP, BMP, TIFF or GIF"
            )
        read_picture(path)
    if any(path.stat().st_size > 10_000 for path in captions.values()):
        raise DataError("a caption file has more than 10,000 bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(pictures):
        words = "-".join(re.findall(r"[a-z0-9]+", path.stem.lower()))[:40]
        name = f"{number:03d}-{words}" if words else f"{number:03d}"
        shutil.copyfile(path, folder / f"{name}{path.suffix.lower()}")
        if path.stem in captions:
            shutil.copyfile(captions[path.stem], folder / f"{name}.txt")
    return len(pictures)
