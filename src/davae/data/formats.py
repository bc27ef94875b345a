"""Image formats that davae opens, and names for the ones that it does not."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from davae.errors import UnreadableImage

# No format that runs a program (EPS through Ghostscript) or that is meant for something else than images.
ALLOWED = frozenset(("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM"))
PLUGINS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}  # module -> package
NEEDED = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".jxl": "pillow-jxl-plugin",
    **dict.fromkeys((".avif", ".avifs"), "a newer Pillow"),
}
OTHER_IMAGES = frozenset(
    (".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".xcf", ".ai")
)
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
NOT_READ = "not an image that davae reads"


@lru_cache(1)
def _register_plugins() -> None:
    """Let installed plugins add their formats to Pillow's registry."""
    Image.init()
    for module in PLUGINS:
        if importlib.util.find_spec(module) is not None:
            plugin = importlib.import_module(module)
            if module == "pillow_heif":
                plugin.register_heif_opener()


@lru_cache(4)
def _allowed(registered: int) -> tuple[str, ...]:
    """Return the formats to open, anew for each number of formats that are registered."""
    foreign = {name for name, entry in Image.OPEN.items() if not entry[0].__module__.startswith("PIL.")}
    return tuple(name for name in Image.ID if name in ALLOWED or name in foreign)


def formats() -> tuple[str, ...]:
    """Return the formats that davae opens: an allow-list and those of Pillow's plugins."""
    _register_plugins()
    return _allowed(len(Image.ID))


@lru_cache(4)
def _endings(allowed: tuple[str, ...]) -> frozenset[str]:
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in allowed or name in ALLOWED
    )


def image_endings() -> frozenset[str]:
    """Return the file endings, `.jpg`, of the formats that davae opens."""
    return _endings(formats())


def is_image_name(name: str) -> bool:
    """Return whether a file name has an ending of a format that davae opens, in any case."""
    before, dot, ending = name.rpartition(".")
    return dot != "" and before[-1:] not in ("", "/") and f".{ending.lower()}" in image_endings()


def unused_kind(name: str) -> str:
    """Return the kind under which a file that is neither image nor caption is counted."""
    ending = Path(name).suffix.lower()
    if ending in NEEDED:
        return f"{ending} (needs {NEEDED[ending]})"
    _register_plugins()
    if ending in OTHER_IMAGES or Image.registered_extensions().get(ending) in Image.OPEN:
        return f"{ending} ({NOT_READ})"
    return ending or "no ending"


def open_image(stream: IO[bytes] | Path) -> Image.Image:
    """Open an image of an allowed format, with its pixels undecoded, for all of davae.

    Raises:
        UnreadableImage: another format, named; no program or decoder of that format runs.
        UnidentifiedImageError: nothing that is known.
    """
    try:
        return Image.open(stream, formats=formats())
    except UnidentifiedImageError:
        if (found := _name_of(_first_bytes(stream))) is not None:
            raise UnreadableImage(*found) from None
        raise


def _first_bytes(stream: IO[bytes] | Path) -> bytes:
    if isinstance(stream, Path):
        with stream.open("rb") as file:
            return file.read(16)
    stream.seek(0)
    return stream.read(16)


def _name_of(prefix: bytes) -> tuple[str, str] | None:
    """Return kind and detail of a file that was refused, by its first bytes alone."""
    if prefix[4:8] == b"ftyp" and prefix[8:12] in HEIF_BRANDS:
        return NOT_READ, "HEIC; `pip install pillow-heif` reads it"
    if prefix.startswith(JPEG_XL):
        return NOT_READ, "JPEG XL; `pip install pillow-jxl-plugin` reads it"
    for name, (_, accept) in Image.OPEN.items():
        if name not in formats() and accept is not None and accept(prefix.ljust(16, b"\0")) is True:
            return NOT_READ, f"{Image.MIME.get(name, name)} ({name})"
    if prefix[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "unknown pixel layout",
            "a TIFF whose pixels Pillow does not decode; save it with 8 or 16 bits a channel",
        )
    return None
