"""Pictures in files: a folder, tar shards on disk, a sample file of arrays."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from davae.data.captions import SourceOptions, as_label, choose, read_record
from davae.data.decoding import decode, header_size
from davae.data.findings import Findings
from davae.data.pictures import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TRIED = 100  # pictures looked at before a caption key counts as found nowhere
TABLE_OPTIONS = ("caption_column", "label_column", "config", "streaming")


class Beside:
    """Caption and class of a picture from what lies beside it: `.txt`, `.json`, `.cls`."""

    def __init__(self, options: SourceOptions, what: str):
        options.refuse(what, TABLE_OPTIONS)
        self.options, self.weights = options, options.record_keys

    def check(self, read: Callable[[int, str], bytes | None], count: int, name: str) -> None:
        """DataError when none of the first pictures has a key that an option names."""
        keys = {**self.weights, **({self.options.label_key: 1.0} if self.options.label_key else {})}
        if not keys:
            return
        records = [self.record(read, i, name) for i in range(min(count, TRIED))]
        seen = {key for record in records for key in record}
        for key in keys:
            if key not in seen:
                has = ", ".join(sorted(seen)[:12]) or "no .json at all"
                raise DataError(f"data: no .json among the first pictures of {name} has the key '{key}'; found {has}")

    def record(self, read: Callable[[int, str], bytes | None], index: int, name: str) -> dict[str, Any]:
        """The `.json` of a picture, its `.txt` under the key `txt`; empty where there is none."""
        data = read(index, "json")
        record = {} if data is None else read_record(data, name)
        if "txt" in self.weights and (text := read(index, "txt")) is not None:
            record["txt"] = text.decode("utf-8", "replace")
        return record

    def caption(
        self, read: Callable[[int, str], bytes | None], index: int, name: str, rng: np.random.Generator | None
    ) -> str | None:
        """None where nothing beside the picture says anything."""
        if self.weights:
            return choose(self.record(read, index, name), self.weights, rng)
        text = read(index, "txt")
        return None if text is None else text.decode("utf-8", "replace").strip()

    def label(self, read: Callable[[int, str], bytes | None], index: int, name: str) -> int | None:
        if self.options.label_key is not None:
            return as_label(self.record(read, index, name).get(self.options.label_key), name)
        data = read(index, "cls")
        return None if data is None else as_label(data.decode("utf-8", "replace").strip(), name)

    def identity(self, read: Callable[[int, str], bytes | None], index: int) -> bytes:
        kinds = ["json"] if self.weights or self.options.label_key else []
        if not self.weights or "txt" in self.weights:
            kinds.append("txt")
        return b"\0".join(read(index, kind) or b"" for kind in (*kinds, "cls"))


class FolderSource:
    """Pictures under a folder; `.txt`, `.json`, `.cls` beside one belong to it, sub-folders are classes."""

    def __init__(self, folder: Path, options: SourceOptions):
        self.folder, self.options = folder, options
        self.beside = Beside(options, f"the folder {folder}")
        self.names = sorted(
            p.relative_to(folder).as_posix()
            for p in folder.rglob("*")
            if p.suffix.lower() in EXTENSIONS and not p.is_dir()
        )
        if not self.names:
            raise DataError(f"folder {folder} holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        parents = sorted({Path(name).parent.name for name in self.names if "/" in name})
        self.classes = {name: number for number, name in enumerate(parents)}
        self.findings = Findings("class folders" if parents else "folder", class_names=tuple(parents))
        self.beside.check(self._read, len(self.names), str(folder))

    def _read(self, index: int, kind: str) -> bytes | None:
        path = self._path(index).with_suffix(f".{kind}")
        return path.read_bytes() if path.is_file() else None

    def _path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self._path(index), self.options.max_pixels, self.options.float_pixels)

    def identity(self, index: int) -> bytes:
        path = self._path(index)
        size = path.stat().st_size if path.is_file() else 0
        return str(size).encode() + b"\0" + self.beside.identity(self._read, index)

    def label(self, index: int) -> int | None:
        own = self.beside.label(self._read, index, self.key(index))
        if own is not None or "/" not in self.names[index]:
            return own
        return self.classes[Path(self.names[index]).parent.name]

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        text = self.beside.caption(self._read, index, self.key(index), rng)
        if text is None:
            name = self.names[index]
            text = Path(name).parent.name.replace("_", " ") if "/" in name else ""
        return text

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        text = self.caption(index, rng)
        return decode(
            self._path(index), self.options.background, self.options.max_pixels, self.options.float_pixels
        ), text


class TarSource:
    """WebDataset shards on disk, read at random through an index of the members: 24 bytes a member and its name."""

    KINDS = ("picture", "txt", "json", "cls")

    def __init__(self, shards: list[Path], options: SourceOptions):
        self.options, self.shards = options, shards
        name = ", ".join(str(shard) for shard in shards[:3]) + (", ..." if len(shards) > 3 else "")
        self.beside = Beside(options, f"the shards {name}")
        self.names: list[str] = []
        self.shard_of: list[int] = []
        places: list[np.ndarray] = []
        for number, shard in enumerate(shards):
            samples = index_tar(shard)
            self.names += [f"{shard.name}/{stem}" for stem in samples]
            self.shard_of += [number] * len(samples)
            places += list(samples.values())
        if not self.names:
            raise DataError(f"{name}: no pictures inside")
        self.places = np.stack(places)  # (N, kinds, 2): offset and size, -1 for none
        self.findings = Findings("shards")
        self._open: dict[int, Any] = {}
        self.beside.check(self._read, len(self.names), name)

    def _read(self, index: int, kind: str) -> bytes | None:
        offset, size = (int(value) for value in self.places[index, self.KINDS.index(kind)])
        if offset < 0:
            return None
        shard = self.shard_of[index]
        if shard not in self._open:
            self._open[shard] = self.shards[shard].open("rb")
        # forked workers share an open file's position, so none is used
        return os.pread(self._open[shard].fileno(), size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # file handles do not travel to workers

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        return header_size(
            io.BytesIO(self._read(index, "picture") or b""), self.options.max_pixels, self.options.float_pixels
        )

    def identity(self, index: int) -> bytes:
        return str(self.places[index, 0, 1]).encode() + b"\0" + self.beside.identity(self._read, index)

    def label(self, index: int) -> int | None:
        return self.beside.label(self._read, index, self.key(index))

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        return self.beside.caption(self._read, index, self.key(index), rng) or ""

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        text = self.caption(index, rng)
        stream = io.BytesIO(self._read(index, "picture") or b"")
        return decode(stream, self.options.background, self.options.max_pixels, self.options.float_pixels), text


def index_tar(shard: Path) -> dict[str, np.ndarray]:
    """Stem of every sample with a picture -> (kinds, 2) offset and size of its members.

    Raises:
        DataError: a shard that is not there or not whole.
    """
    samples: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                stem, _, extension = member.name.rpartition(".")
                kind = "picture" if f".{extension.lower()}" in EXTENSIONS else extension
                if member.isfile() and kind in TarSource.KINDS:
                    places = samples.setdefault(stem, np.full((len(TarSource.KINDS), 2), -1, np.int64))
                    places[TarSource.KINDS.index(kind)] = member.offset_data, member.size
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {shard} is not a whole tar file: {error}") from error
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror or error}") from error
    return {stem: places for stem, places in samples.items() if places[0, 0] >= 0}


class NpzSource:
    """Pictures of an ADM sample file: `arr_0` (N,H,W,3) uint8 and, where it has them, classes in `arr_1`."""

    def __init__(self, path: Path, options: SourceOptions):
        options.refuse(f"the arrays of {path}", ("caption_key", "caption_weights", "label_key", *TABLE_OPTIONS))
        try:
            with np.load(path) as file:
                self.labels = file["arr_1"] if "arr_1" in file.files else None
            self.pictures = map_npz(path, "arr_0.npy")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no .npz with pictures in arr_0: {error}") from error
        if self.pictures.ndim != 4 or self.pictures.shape[-1] != 3 or self.pictures.dtype != np.uint8:
            raise DataError(f"{path}: arr_0 is {self.pictures.shape} {self.pictures.dtype}, expected (N,H,W,3) uint8")
        self.name = path.name
        self.findings = Findings("sample file")

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.pictures.shape[1:3]
        return width, height

    def identity(self, index: int) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.pictures[index]).tobytes()).digest()

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        return ""

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
