"""Picture sources: a folder, WebDataset shards, a Hugging Face dataset, or the embedded OpenMoji set."""

from __future__ import annotations

import glob
import io
import logging
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from davae.data.pictures import DataError, PictureSource, UnreadablePicture

logger = logging.getLogger(__name__)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def upright_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any picture as sRGB, turned as its EXIF says, alpha composited on `background`."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGB", "L", "CMYK") and (profile := image.info.get("icc_profile")):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return cast(Image.Image, converted)
        except ImageCms.PyCMSError as error:
            logger.warning("colour profile ignored: %s", error)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        peak = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / peak * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def decode(stream: io.BytesIO | Path, background: str) -> Image.Image:
    """Read one picture completely; UnreadablePicture says why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                image.load()
                return upright_rgb(image, background)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"too many pixels: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UnreadablePicture(f"cannot be read: {error}") from error


def header_size(stream: Any) -> tuple[int, int]:
    """(width, height) upright, from the header alone; (0, 0) where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                width, height = image.size
                return (height, width) if turned else (width, height)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return 0, 0


class FolderSource:
    """Pictures under a folder; a `.txt` beside one is its caption, sub-folders are classes."""

    def __init__(self, folder: Path, background: str):
        self.folder, self.background = folder, background
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not self.paths:
            raise DataError(f"folder {folder} holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        self.classes = sorted({path.parent.name for path in self.paths if path.parent != folder})

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self.paths[index])

    def label(self, index: int) -> int | None:
        parent = self.paths[index].parent
        return None if parent == self.folder else self.classes.index(parent.name)

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        path = self.paths[index]
        caption = path.with_suffix(".txt")
        if caption.is_file():
            text = caption.read_text(encoding="utf-8", errors="replace").strip()
        else:
            text = path.parent.name.replace("_", " ") if path.parent != self.folder else ""
        return decode(path, self.background), text


class TarSource:
    """WebDataset shards on disk, read at random through an index of the members."""

    def __init__(self, shards: list[Path], background: str):
        self.background = background
        self.members: list[tuple[Path, int, int, str]] = []  # shard, offset, size, key
        self.texts: dict[str, tuple[Path, int, int]] = {}
        self.labels: dict[str, tuple[Path, int, int]] = {}
        for shard in shards:
            try:
                with tarfile.open(shard) as archive:
                    for member in archive:
                        if member.isfile():
                            self._add(shard, member)
            except (tarfile.TarError, EOFError) as error:
                raise DataError(f"shard {shard} is not a whole tar file: {error}") from error
        if not self.members:
            raise DataError(f"{', '.join(str(s) for s in shards)}: no pictures inside")
        self._open: dict[Path, Any] = {}

    def _add(self, shard: Path, member: tarfile.TarInfo) -> None:
        stem, _, extension = member.name.rpartition(".")
        place = (shard, member.offset_data, member.size)
        key = f"{shard.name}/{stem}"
        if f".{extension.lower()}" in EXTENSIONS:
            self.members.append((*place, key))
        elif extension == "txt":
            self.texts[key] = place
        elif extension == "cls":
            self.labels[key] = place

    def _read(self, shard: Path, offset: int, size: int) -> bytes:
        if shard not in self._open:
            self._open[shard] = shard.open("rb")
        self._open[shard].seek(offset)
        return self._open[shard].read(size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # file handles do not travel to workers

    def __len__(self) -> int:
        return len(self.members)

    def key(self, index: int) -> str:
        return self.members[index][3]

    def size(self, index: int) -> tuple[int, int]:
        return header_size(io.BytesIO(self._read(*self.members[index][:3])))

    def label(self, index: int) -> int | None:
        place = self.labels.get(self.key(index))
        return None if place is None else int(self._read(*place))

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        place = self.texts.get(self.key(index))
        text = "" if place is None else self._read(*place).decode("utf-8", "replace").strip()
        return decode(io.BytesIO(self._read(*self.members[index][:3])), self.background), text


class NpzSource:
    """Pictures of an ADM sample file: `arr_0` (N,H,W,3) uint8 and, where it has them, classes in `arr_1`."""

    def __init__(self, path: Path):
        try:
            with np.load(path) as file:
                self.labels = file["arr_1"] if "arr_1" in file.files else None
            self.pictures = map_npz(path, "arr_0.npy")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no .npz with pictures in arr_0: {error}") from error
        if self.pictures.ndim != 4 or self.pictures.shape[-1] != 3 or self.pictures.dtype != np.uint8:
            raise DataError(f"{path}: arr_0 is {self.pictures.shape} {self.pictures.dtype}, expected (N,H,W,3) uint8")
        self.name = path.name

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.pictures.shape[1:3]
        return width, height

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        return Image.fromarray(np.ascontiguousarray(self.pictures[index])), ""


def map_npz(path: Path, member: str) -> np.ndarray:
    """One array of an `.npz`, mapped from disk where it is stored uncompressed (50,000 pictures fill gigabytes)."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = np.frombuffer(stream.read(4), "<u2")
        stream.seek(info.header_offset + 30 + int(name) + int(extra))
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        return np.memmap(path, dtype, "r", offset=stream.tell(), shape=shape, order="F" if fortran else "C")


class HubSource:
    """A Hugging Face dataset with an image column (the `hub` extra)."""

    def __init__(self, name: str, background: str, image_column: str, caption_column: str | None):
        try:
            import datasets
            from datasets.exceptions import DatasetNotFoundError
        except ImportError as error:
            raise DataError(f"data.source '{name}': Hugging Face datasets need `pip install davae[hub]`") from error
        try:
            self.rows: Any = datasets.load_dataset(name, split="train")
        except (
            DatasetNotFoundError,
            FileNotFoundError,
            ConnectionError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"data.source '{name}' is no file or folder here, and the hub gave no dataset: {reason}"
            ) from error
        if image_column not in self.rows.column_names:
            raise DataError(
                f"data.image_column '{image_column}' is not in {name}; it has {', '.join(self.rows.column_names)}"
            )
        self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))
        self.name, self.image, self.background = name, image_column, background
        guesses = [c for c in ("text", "caption", "prompt") if c in self.rows.column_names]
        self.caption = caption_column or (guesses[0] if guesses else None)
        if self.caption is not None and self.caption not in self.rows.column_names:
            raise DataError(f"data.caption_column '{self.caption}' is not in {name}")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def _stream(self, index: int) -> Any:
        cell = self.rows[index][self.image]
        return io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self._stream(index))

    def label(self, index: int) -> int | None:
        return None

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        text = str(self.rows[index][self.caption]) if self.caption else ""
        return decode(self._stream(index), self.background), text


def expand_shards(pattern: str) -> list[Path]:
    """'a-{000..003}.tar' and '*.tar' -> existing files in order."""
    if found := BRACES.search(pattern):
        first, last = found.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [
            path for n in numbers for path in expand_shards(pattern[: found.start()] + n + pattern[found.end() :])
        ]
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise DataError(f"data.source: no shard matches {pattern}")
    return paths


def open_source(
    name: str,
    resolution: int,
    *,
    background: str = "white",
    image_column: str = "image",
    caption_column: str | None = None,
) -> PictureSource:
    """The source that a recipe's `data.source` names.

    Args:
        name: `openmoji` or `openmoji-all`, a folder, a .tar or shard pattern, an ADM .npz, or a Hugging Face dataset id.
        resolution: pixels that will be asked for; OpenMoji is rendered large enough.
        background: what alpha is composited on.
        image_column, caption_column: Hugging Face datasets only.

    Raises:
        DataError: when there is nothing there, in one line that says what was looked for.
    """
    if name in ("openmoji", "openmoji-all"):
        from davae.data.openmoji import OpenMoji

        return OpenMoji(resolution, everything=name == "openmoji-all")
    if Path(name).is_dir():
        return FolderSource(Path(name), background)
    if name.endswith(".tar"):
        return TarSource(expand_shards(name), background)
    if name.endswith(".npz") and Path(name).is_file():
        return NpzSource(Path(name))
    if name.startswith((".", "/", "~")) or Path(name).suffix:
        raise DataError(f"data.source: {name} does not exist")
    return HubSource(name, background, image_column, caption_column)


def usable(source: PictureSource, indices: list[int], resolution: int) -> list[int]:
    """The indices whose headers say at least `resolution` pixels each way; the others are named in the log.

    A header that cannot be read is left in: decoding it later says why, counts it and goes on.

    Raises:
        DataError: when none is left, naming the largest that was found.
    """
    sizes = {index: source.size(index) for index in indices}
    small = [i for i in indices if 0 < min(sizes[i]) < resolution]
    for index in small:
        logger.warning(
            "left out %s: %dx%d is smaller than the target of %d pixels",
            source.key(index),
            *sizes[index],
            resolution,
        )
    if indices and len(small) == len(indices):
        width, height = max((sizes[i] for i in indices), key=min)
        raise DataError(
            f"every picture is smaller than the target of {resolution} pixels (the largest is {width}x{height}): davae "
            "never enlarges training data; use larger pictures or a smaller base.resolution"
        )
    left_out = set(small)
    return [i for i in indices if i not in left_out]
