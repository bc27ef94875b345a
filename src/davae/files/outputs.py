"""Single files that davae writes: which of those that are there davae may write over."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from davae.errors import RunError
from davae.files.atomic import atomic_file, atomic_text
from davae.files.ownership import check_no_part, check_parents
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

SIGNED = "}\n\n"  # figures end with an empty line: no key is added to them, and no other program ends JSON so
# keys by which other programs' files are known, among figures of davae versions that signed nothing
FOREIGN = {"_class_name", "_diffusers_version", "architectures", "model_type", "transformers_version", "version"}
FOREIGN |= {"name"}
LARGEST = 1 << 26  # bytes of a file that is read to see whose it is
SOFTWARE = "davae"  # of a PNG's text entry `Software`, a safetensors' metadata, a zip's comment
DRAWN = re.compile(r"[a-z0-9-]+-seed-?\d+-\d{3,}\.png|grid-seed-?\d+\.png")  # images of `davae sample`


def refuse(path: Path, what: str) -> None:
    """Raise the one line for a file that is in the way."""
    raise RunError(f"{path}: it exists and is not {what}; use another name, or move it away")


def check_place(path: Path) -> bool:
    """Return whether a regular file is there, and not a device such as /dev/stdout.

    Raises:
        RunError: the path is a folder, lies below a file, or in what a run writes.
    """
    check_parents(path)
    check_no_part(path)
    if path.is_dir():
        raise RunError(f"{path}: it is a folder; give the name of a file")
    return path.is_file()


# -- figures ---------------------------------------------------------------------------------------------------------


def figures_text(figures: dict[str, Any]) -> str:
    """Return figures as JSON, in the form by which davae knows its own files."""
    return json.dumps(figures, indent=2) + "\n\n"


def check_figures(path: Path) -> None:
    """Refuse a file that does not hold figures of davae.

    Raises:
        RunError: in one line, what is there.
    """
    if not check_place(path):
        return
    if path.stat().st_size > LARGEST:
        refuse(path, "a file of figures that davae wrote")
    try:
        text = path.read_text(encoding="utf-8")
        values = load_json(text) if text.strip() else {}
        former = isinstance(values, dict) and text == json.dumps(values, indent=2) + "\n"
        former = former and _has_number(values)
    except (ValueError, RecursionError):  # deeper than davae's own
        refuse(path, "a file of figures that davae wrote")
        return
    if text and not (text.endswith(SIGNED) or (former and not FOREIGN & values.keys())):
        refuse(path, "a file of figures that davae wrote")


def _has_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_number, value.values()))
    if isinstance(value, list):
        return any(map(_has_number, value))
    return isinstance(value, (int, float))


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON over figures, or where nothing is.

    Raises:
        RunError: another file is there, or it cannot be written.
    """
    check_figures(path)
    if path.exists() and not path.is_file():  # a pipe or a device is written to, never replaced
        path.write_text(figures_text(figures), encoding="utf-8")
    else:
        atomic_text(path, figures_text(figures))


# -- images ----------------------------------------------------------------------------------------------------------


def check_image(path: Path) -> None:
    """Refuse a PNG that davae did not write. An empty file is nobody's.

    Raises:
        RunError: in one line, what is there.
    """
    from PIL import Image

    if not check_place(path) or path.stat().st_size == 0:
        return
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = dict(image.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        text = {}
    numbers = path.with_suffix(".json")
    if text.get("Software") == SOFTWARE:
        return
    if (
        DRAWN.fullmatch(path.name)
        and not text
        and any(grid.stat().st_size for grid in path.parent.glob("grid-seed*.png"))
    ):
        return  # of a davae that left no mark
    if not (numbers.is_file() and text.get("Software", "").startswith("Matplotlib")):
        refuse(path, "an image that davae wrote")
    check_figures(numbers)


def save_image(image: Any, path: Path, made_from: str = "", **options: Any) -> None:
    """Write a PIL image as a PNG that names davae, over one of davae's or where nothing is.

    Args:
        made_from: fingerprint of all that the image depends on, kept as its text `davae`.
        options: what Pillow writes into the PNG too, such as `icc_profile` and `exif`.

    Raises:
        RunError: another file is there, or it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    check_image(path)
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    if made_from:
        about.add_text(SOFTWARE, made_from)
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=about, **options)


# -- weights and arrays ----------------------------------------------------------------------------------------------


def check_tensor_file(path: Path, reads: Iterable[Path] = ()) -> None:
    """Refuse a safetensors file that davae did not write, and one that the command reads.

    Raises:
        RunError: in one line, what is there.
    """
    from safetensors import SafetensorError, safe_open

    if not check_place(path):
        return
    if any(source.exists() and source.samefile(path) for source in reads):
        raise RunError(f"{path}: this command reads it; use another --out")
    try:
        with safe_open(path, framework="np") as stream:
            about = stream.metadata() or {}
    except (SafetensorError, OSError):
        about = {}
    if SOFTWARE not in about and not about.get("format", "").startswith(SOFTWARE):
        refuse(path, "a file that davae wrote")


def check_archive(path: Path, parts: Path) -> None:
    """Refuse an `.npz` that davae did not write.

    Args:
        parts: the folder of its parts, by which davae versions without marks are known.

    Raises:
        RunError: in one line, what is there.
    """
    if not check_place(path) or (parts / "settings.json").is_file():
        return
    if not archive_comment(path).startswith(SOFTWARE.encode()):
        refuse(path, "a sample file that davae wrote")


def archive_comment(path: Path) -> bytes:
    """Return the comment of a zip archive, nothing for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except (zipfile.BadZipFile, OSError):
        return b""


# -- drawn files -------------------------------------------------------------------------------------------------------

LAST = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9", ".tar": bytes(512)}  # the last bytes of a whole file


def is_drawn(path: Path) -> bool:
    """Return whether an image, shard or part of samples is whole, and log a cut one.

    Judged by the last bytes, or by the size that the header names: images are not decoded. Versions before checksums did not
    wait for the disk, so that a power cut could leave an empty file under a final name.
    """
    if not path.is_file():
        return False
    if path.suffix == ".npy":
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            whole = False
        else:
            whole = True
    else:
        end = LAST[path.suffix]
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - len(end)))
            whole = stream.read() == end
    if not whole:
        logger.warning("%s is empty or cut; it is drawn again", path)
    return whole
