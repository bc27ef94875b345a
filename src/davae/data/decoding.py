"""Bytes of any picture -> an upright sRGB picture, or why not."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from davae.data.pictures import UnreadablePicture

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB, Pillow's own default; `data.max_pixels` moves it
ORIENTATION = 0x0112
SEQUENCES = {
    "GIF",
    "WEBP",
    "PNG",
    "TIFF",
}  # formats whose frames are an animation or pages; phones' MPO is one picture
DAMAGE = (  # what Pillow's decoders raise on damaged bytes
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


@contextmanager
def naming_damage() -> Iterator[list[warnings.WarningMessage]]:
    """Turn whatever a picture's bytes provoke into an UnreadablePicture with its kind; gives what Pillow warns of."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield told
    except FileNotFoundError as error:
        raise UnreadablePicture("missing file", f"{error.strerror or error}") from error
    except UnidentifiedImageError as error:
        raise UnreadablePicture("not a picture", "no format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePicture("too many pixels", str(error)) from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file system's, not a decoder's
            raise UnreadablePicture("cannot be opened", f"{error.strerror or error}") from error
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        cut = isinstance(error, EOFError) or "truncat" in reason.lower()
        raise UnreadablePicture("truncated" if cut else "damaged", reason) from error


def checked(stream: io.BytesIO | Path) -> io.BytesIO | Path:
    """The stream itself, unless it has no bytes at all."""
    empty = stream.stat().st_size == 0 if isinstance(stream, Path) else not stream.getbuffer().nbytes
    if empty:
        raise UnreadablePicture("empty file")
    return stream


def orientation(image: Image.Image, told: list[warnings.WarningMessage]) -> int:
    """EXIF's orientation, 1 where there is no EXIF; `told` is what Pillow warned of while it read the picture.

    Of a PNG that is not loaded yet, only metadata before the pixels counts: Pillow decodes all of it to look behind them.

    Raises:
        UnreadablePicture: damaged EXIF that does not tell the orientation, so that nobody knows which way is up.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    block = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    damage = f"it begins with {bytes(block[:4])!r}" if block and block[:4] not in (b"II*\0", b"MM\0*") else ""
    value = None
    try:
        value = image.getexif().get(ORIENTATION)
    except DAMAGE as error:
        damage = " ".join(str(error).split())[:100] or type(error).__name__
    damage = damage or next((" ".join(str(w.message).split()) for w in told if "EXIF" in str(w.message)), "")
    if damage and value is None:
        raise UnreadablePicture("damaged metadata", f"EXIF: {damage}")
    return value if isinstance(value, int) else 1


def check_header(image: Image.Image, max_pixels: int) -> None:
    """UnreadablePicture for a picture of too many pixels or of several frames."""
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadablePicture("too many pixels", f"{width}x{height}, the limit data.max_pixels is {max_pixels}")
    frames = getattr(image, "n_frames", 1) if image.format in SEQUENCES else 1
    if frames > 1:
        raise UnreadablePicture("animation", f"{frames} frames")


def header_size(stream: io.BytesIO | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) upright, from the header alone; UnreadablePicture where that already tells that it is no use."""
    with naming_damage() as told, Image.open(checked(stream)) as image:
        check_header(image, max_pixels)
        width, height = image.size
        return (height, width) if orientation(image, told) in (5, 6, 7, 8) else (width, height)


def decode(stream: io.BytesIO | Path, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one picture completely; UnreadablePicture says why not."""
    with naming_damage() as told, Image.open(checked(stream)) as image:
        check_header(image, max_pixels)
        image.load()
        orientation(image, told)
        return upright_rgb(image, background)


def upright_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any picture as sRGB, turned as its EXIF says, alpha composited on `background`."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        peak = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / peak * 255).clip(0, 255).astype(np.uint8))
    profile = image.info.get("icc_profile")
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
    """An RGB, L or CMYK picture from its embedded ICC profile to sRGB; a profile that cannot be used is ignored, with a
    warning."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("colour profile ignored: %s", error)
        return image.convert("RGB")
    return cast(Image.Image, converted)
