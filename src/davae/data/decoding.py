"""Decoding: the bytes of any image become an upright sRGB image, or a fault with a kind."""

from __future__ import annotations

import errno
import io
import logging
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from davae.data.formats import open_image
from davae.data.png_metadata import png_metadata
from davae.errors import DataError, UnreadableImage

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB, Pillow's own default; `data.max_pixels` moves it
MAX_FRAMES = 1000  # counted; more is an animation all the same
MAX_COUNTED = 1 << 24  # bytes of a GIF whose frames are counted
ORIENTATION, TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_PHOTOMETRIC = 0x0112, 256, 257, 258, 262
SIXTEEN_BIT_AS_I = ("PNG", "PPM")  # formats whose 16 bits Pillow gives, in some releases, as 32-bit integers
# Phones put depth maps and thumbnails behind the image; elsewhere frames are an animation.
ONE_IMAGE = ("MPO", "HEIF")
Floats = Literal["refuse", "unit"]
OF_ONE = {"too many pixels": "reduce or cut it first", "float pixels": "save it with 8 or 16 bits a channel"}
DAMAGE = (  # what Pillow's decoders raise on damaged bytes
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError),
    *(RuntimeError, struct.error, zlib.error),
)
# Faults of one file, which another try meets again; decoders raise EINVAL where damaged bytes lead outside the file.
OF_THE_FILE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL}
OF_THE_FILE |= {errno.EACCES, errno.EPERM}  # rights of one file; the cache refuses many of them


class DiskFault(DataError):
    """A file that its disk does not give now, and perhaps later."""


def of_the_disk(error: OSError) -> bool:
    """Return whether a file may be read later, unlike a missing or damaged one."""
    return error.errno is not None and error.errno not in OF_THE_FILE


def disk_fault(name: object, error: OSError) -> DiskFault:
    """Return the error of a file that its disk does not give now."""
    return DiskFault(
        f"{name} cannot be read: {error.strerror or error}; see to its disk and rights, then run the same command again"
    )


@contextmanager
def naming_damage(source: object = None) -> Iterator[list[warnings.WarningMessage]]:
    """Turn what an image's bytes provoke into an UnreadableImage, and yield warnings.

    A fault of the disk is a DataError where `source` is a path, else it stays an OSError.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    except FileNotFoundError as error:
        raise UnreadableImage("missing file", f"{error.strerror or error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image", "no format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too many pixels", str(error)) from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file system's, not a decoder's
            if not of_the_disk(error):
                raise UnreadableImage("cannot be opened", f"{error.strerror or error}") from error
            if isinstance(source, (str, Path)) and str(source):
                raise disk_fault(source, error) from error
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        cut = isinstance(error, EOFError) or "truncat" in reason.lower()
        raise UnreadableImage("truncated" if cut else "damaged", reason) from error


def checked_stream(stream: IO[bytes] | Path) -> IO[bytes] | Path:
    """Return the stream itself, unless it is empty or no file that ends (a pipe or a device)."""
    if isinstance(stream, Path):
        status = stream.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("cannot be opened", "not a regular file")
        size = status.st_size
    else:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
    if size == 0:
        raise UnreadableImage("empty file")
    return stream


def orientation(image: Image.Image, warned: list[warnings.WarningMessage]) -> int:
    """Return the orientation, 1 to 8, by which Pillow turns an image, from EXIF or else XMP.

    Args:
        image: an opened image; a PNG must be loaded, because its metadata may come after the pixels.
        warned: warnings of Pillow while it read the image.

    Raises:
        UnreadableImage: damaged EXIF without an orientation, which leaves the upright side unknown.
    """
    block = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    damage = f"it begins with {bytes(block[:4])!r}" if block and block[:4] not in (b"II*\0", b"MM\0*") else ""
    value = None
    try:
        value = image.getexif().get(ORIENTATION)
    except DAMAGE as error:
        damage = " ".join(str(error).split())[:100] or type(error).__name__
    damage = damage or next((" ".join(str(w.message).split()) for w in warned if "EXIF" in str(w.message)), "")
    if damage and value is None:
        raise UnreadableImage("damaged metadata", f"EXIF: {damage}")
    return value if isinstance(value, int) else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) before turning, also of a TIFF, which Pillow 11.3 turns already."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
    return image.size


def check_header(image: Image.Image, max_pixels: int, floats: Floats = "refuse") -> None:
    """Check the header of an image before its pixels are decoded.

    Raises:
        UnreadableImage: too many pixels, several frames, or numbers of an unknown range.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage("too many pixels", f"{width}x{height}, the limit data.max_pixels is {max_pixels}")
    if image.format not in ONE_IMAGE and (frames := frames_in_words(image)):
        raise UnreadableImage("animation", frames)
    if image.mode == "F" and floats == "refuse":
        raise UnreadableImage("float pixels", "set data.float_pixels=unit where 0 is black and 1 is white")
    if image.mode == "I" and image.format not in SIXTEEN_BIT_AS_I:
        raise UnreadableImage("32-bit pixels", "their range is not known; save the image with 8 or 16 bits")


def frames_in_words(image: Image.Image) -> str:
    """Return the number of frames or pages in words, '' for one, counted up to MAX_FRAMES."""
    if image.format == "GIF":  # counting reads the whole file
        if not getattr(image, "is_animated", False):
            return ""
        count = getattr(image, "n_frames", 2) if _length(image) <= MAX_COUNTED else 2
        return f"{count}{'' if _length(image) <= MAX_COUNTED else ' or more'} frames"
    count = getattr(image, "n_frames", 1) if image.format != "TIFF" else _pages(image)
    return "" if count <= 1 else f"{count} frames" if count < MAX_FRAMES else f"{MAX_FRAMES} or more frames"


def _length(image: Image.Image) -> int:
    """Return the size of an opened file in bytes."""
    assert isinstance(image, ImageFile)
    assert image.fp is not None
    position = image.fp.tell()
    length = image.fp.seek(0, io.SEEK_END)
    image.fp.seek(position)
    return length


def _pages(image: Image.Image) -> int:
    """Count the pages of a TIFF one by one: a small file may hold millions."""
    count = 1
    try:
        while count < MAX_FRAMES:
            image.seek(count)
            count += 1
    except EOFError:
        pass
    image.seek(0)
    return count


def header_size(stream: IO[bytes] | Path, max_pixels: int = MAX_PIXELS, floats: Floats = "refuse") -> tuple[int, int]:
    """Return the (width, height) that `decode_image` gives, from headers and metadata alone.

    Raises:
        UnreadableImage: the header already shows that the image cannot be used.
        DataError, OSError: as `naming_damage` raises them.
    """
    with naming_damage(stream) as caught, open_image(checked_stream(stream)) as image:
        check_header(image, max_pixels, floats)
        width, height = stored_size(image)
        if image.format == "PNG":
            assert isinstance(image, ImageFile)
            assert image.fp is not None
            with open_image(png_metadata(image.fp)) as metadata:
                metadata.load()
                turn = orientation(metadata, caught)
        else:
            turn = orientation(image, caught)
        return (height, width) if turn in (5, 6, 7, 8) else (width, height)


def decode_image(
    stream: IO[bytes] | Path, background: str = "white", max_pixels: int = MAX_PIXELS, floats: Floats = "refuse"
) -> Image.Image:
    """Decode one image to upright sRGB.

    Args:
        background: colour behind transparent parts.
        max_pixels: larger images are refused before they are decoded.
        floats: `refuse`, or `unit` to read float pixels as 0 (black) to 1 (white).

    Raises:
        UnreadableImage: an image that cannot be used, with its kind.
    """
    with loaded_image(stream, max_pixels, floats) as (image, _):
        return upright_rgb(image, background)


@contextmanager
def loaded_image(
    stream: IO[bytes] | Path, max_pixels: int = MAX_PIXELS, floats: Floats = "refuse"
) -> Iterator[tuple[Image.Image, int]]:
    """Yield an image with its pixels, as it is stored, and its orientation, 1 to 8.

    Args:
        stream, max_pixels, floats: as `decode_image` takes them.

    Raises:
        UnreadableImage: an image that cannot be used, with its kind; also for damage that the block finds.
    """
    with naming_damage(stream) as caught, open_image(checked_stream(stream)) as image:
        check_header(image, max_pixels, floats)
        raw_mode = _raw_mode(image)
        image.load()
        turn = orientation(image, caught)
        fix_transparent_value(image, raw_mode)
        yield image, turn


def converted_image(image: Image.Image) -> Image.Image:
    """Return an image of Pillow as upright sRGB on white, by the rules for files.

    Raises:
        UnreadableImage: an animation, pixels of an unknown range, or damage that Pillow finds when it loads them.
    """
    with naming_damage(getattr(image, "filename", None)) as caught:
        check_header(image, MAX_PIXELS)
        raw_mode = _raw_mode(image)
        image.load()
        turn = orientation(image, caught)
        own = (
            image if isinstance(image, TiffImageFile) and turn == 1 else image.copy()
        )  # a copy forgets the bits of TIFF
        fix_transparent_value(own, raw_mode)
        return upright_rgb(own)


def read_image(path: Path) -> Image.Image:
    """Decode one image file that must be there, within the limits of `decode_image`.

    Raises:
        DataError: it cannot be read, in one line with its path.
    """
    try:
        return decode_image(path)
    except UnreadableImage as error:
        raise DataError(f"{path}: {fault_of_one(error)}") from error


def fault_of_one(error: UnreadableImage) -> str:
    """Return the fault of a single image, with a remedy that needs no setting of a data set."""
    if error.kind == "missing file":
        return "there is no such file or folder; give images, or folders of them"
    remedy = OF_ONE.get(error.kind)
    return f"{error.kind}; {remedy}" if remedy else str(error)


def _raw_mode(image: Image.Image) -> str:
    """Return the layout of the pixels in the file, such as L with 4 bits, or ''."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def fix_transparent_value(image: Image.Image, raw_mode: str) -> None:
    """Scale a PNG's transparent value to 8 bits, as Pillow scales its pixels."""
    value = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * 255 // (2 ** int(raw_mode[2:]) - 1)
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(part >> 8 for part in value)


def to_8_bit(image: Image.Image) -> Image.Image:
    """Turn one channel of 16 bits, or floats in 0..1, into L, or LA with a transparent value.

    Raises:
        UnreadableImage: floats outside 0..1.
    """
    values = np.asarray(image)  # (H,W)
    white = 65535.0
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # also not a number
            raise UnreadableImage("float pixels", f"values from {low:g} to {high:g} where 0 to 1 was expected")
        white = 1.0
    elif isinstance(image, TiffImageFile):
        white = 2.0 ** image.tag_v2.get(TIFF_BITS, (16,))[0] - 1
        if image.tag_v2.get(TIFF_PHOTOMETRIC) == 0:  # 0 is white, which Pillow applies to 8 bits alone
            values = white - values
    grey = Image.fromarray((values * (255.0 / white)).round().clip(0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def upright_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return any image as sRGB, turned as its metadata demand, composited on `background`."""
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = to_8_bit(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode == "LAB":
        return to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("L", "LA") and profile:
        image = image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    rgb = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return rgb
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image from its embedded ICC profile to sRGB, without one that is damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("colour profile ignored: %s", error)
        return image.convert("RGB")
    return cast(Image.Image, converted)
