"""ADM sample files: arrays of images and classes in one `.npz`."""

from __future__ import annotations

import hashlib
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from davae.data.findings import Findings
from davae.data.options import TABLE_OPTIONS, SourceOptions
from davae.errors import DataError

# Bytes of a compressed array; a larger one must be stored uncompressed, so that it is mapped from disk.
UNPACKED = 1 << 31
DAMAGE = (  # what zipfile and NumPy raise on damaged bytes
    *(OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, NotImplementedError),
    *(RuntimeError, OverflowError, struct.error, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


class NpzSource:
    """Images of an ADM sample file, `arr_0` (N,H,W,3) uint8, with any classes in `arr_1` (N,).

    Raises:
        DataError: another layout, fewer labels than images, or a compressed array that would fill the memory.
    """

    def __init__(self, path: Path, options: SourceOptions):
        options.refuse(f"the arrays of {path}", ("caption_key", "caption_weights", "label_key", *TABLE_OPTIONS))
        try:
            with zipfile.ZipFile(path) as archive:
                members = set(archive.namelist())
            self.images = map_npz(path, "arr_0.npy")
            self.labels = map_npz(path, "arr_1.npy") if "arr_1.npy" in members else None
        except DataError:
            raise
        except DAMAGE as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(f"{path} is not an .npz with images in arr_0: {reason}") from error
        if self.images.ndim != 4 or self.images.shape[-1] != 3 or self.images.dtype != np.uint8:
            raise DataError(f"{path}: arr_0 is {self.images.shape} {self.images.dtype}, expected (N,H,W,3) uint8")
        if not self.images.size:
            raise DataError(f"{path}: arr_0 is {self.images.shape}, which holds no images")
        if self.labels is not None and (
            self.labels.shape != self.images.shape[:1] or not np.issubdtype(self.labels.dtype, np.integer)
        ):
            raise DataError(
                f"{path}: arr_1 is {self.labels.shape} {self.labels.dtype}, expected one whole number for each of the "
                f"{len(self.images)} images in arr_0"
            )
        self.name = path.name
        self.findings = Findings("sample file")

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.images.shape[1:3]
        return width, height

    def stamp(self, index: int) -> bytes:
        return b""

    def identity(self, index: int) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.images[index]).tobytes()).digest()

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        return ""

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        return Image.fromarray(np.ascontiguousarray(self.images[index])), ""


def map_npz(path: Path, member: str) -> np.ndarray:
    """Return one array of an `.npz`, mapped from disk where it is stored uncompressed.

    Raises:
        DataError: a compressed array of more than 2 GiB.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return _unpack(archive, info, path)
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = np.frombuffer(stream.read(4), "<u2")
        stream.seek(info.header_offset + 30 + int(name) + int(extra))
        shape, fortran, dtype = _read_header(stream)
        return np.memmap(path, dtype, "r", offset=stream.tell(), shape=shape, order="F" if fortran else "C")


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(info) as stream:
        shape, _, dtype = _read_header(stream)
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    if max(size, info.file_size) > UNPACKED:
        raise DataError(
            f"{path}: {info.filename} is compressed and takes {max(size, info.file_size) / 2**30:.1f} GiB of memory; "
            "save it with np.savez, which does not compress and is read from disk"
        )
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _read_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and type of an array without reading it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype
