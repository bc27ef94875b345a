"""Checksums of what davae writes: a flipped bit is found before it reaches a weight.

CRC-32 by zlib: 2.9 GB/s on one core of the machine this was written on (SHA-256 1.2, BLAKE2 0.5), and every single flipped
bit and every burst of 32 bits changes it. Three places hold the sums:

- Safetensors files written by `save_tensors`: a sum per tensor in the metadata, verified when the tensors are read.
- Shards of a latent cache: a sum per row next to the rows, verified each time a row is read. A row is in memory then, so
  nothing is read for the check alone: 0.1 ms for a latent of 256 KiB, and opening a cache of terabytes stays instant. Sums
  of whole shards would make every worker process of every rank read the whole cache once.
- Model folders: `checksums.json` with a sum per file, verified once a process when davae loads a part.

Files without sums, from earlier versions or other programs, are accepted.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from davae.errors import DavaeError, ModelError
from davae.files.reading import load_json

if TYPE_CHECKING:
    from torch import Tensor

KEY = "crc32"  # in the metadata of a safetensors file
SUFFIX = ".crc32"  # of the tensor that holds another one's sum, or the sums of its rows
SUMS = "checksums.json"
EDITABLE = {SUMS, "README.md", ".gitattributes"}  # not what a model computes with
BLOCK = 1 << 24


def array_sum(values: np.ndarray | Tensor) -> int:
    """Return the CRC-32 of an array's bytes."""
    if not isinstance(values, np.ndarray):
        import torch  # `davae --help` does without

        values = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data) if values.size else 0


def file_sum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


# -- tensors -----------------------------------------------------------------------------------------------------------


def tensor_sums(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metadata entry with a sum per tensor and, under '', one of other metadata.

    Args:
        tensors: by name.
        metadata: the file's other metadata.
    """
    sums = {name: array_sum(values) for name, values in tensors.items()}
    return {KEY: json.dumps({**sums, "": _metadata_sum(metadata or {})})}


def _metadata_sum(metadata: Mapping[str, str]) -> int:
    others = {name: value for name, value in metadata.items() if name != KEY}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def row_sums(values: np.ndarray) -> np.ndarray:
    """Return the sums of the rows (N,...) of an array, as (N,) uint32."""
    return np.asarray([array_sum(row) for row in values], np.uint32)


def check_tensor_sums(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], kind: type[DavaeError], remedy: str
) -> None:
    """Compare tensors with the sums in their file's metadata, if it has any.

    Args:
        path: the file, named in the message.
        tensors: some or all of its tensors by name, in the file's own dtype.
        metadata: the metadata of the file.
        kind: the error to raise.
        remedy: what to do, the end of the message.

    Raises:
        kind: a tensor is not what was written.
    """
    if KEY not in metadata:
        return
    try:
        expected = dict(load_json(metadata[KEY]))
    except (ValueError, TypeError) as error:
        raise kind(f"{path}: its checksums are damaged; {remedy}") from error
    if expected.get("", _metadata_sum(metadata)) != _metadata_sum(metadata):
        raise kind(f"{path}: its metadata is not what was written (its checksum differs); {remedy}")
    for name, values in tensors.items():
        if name in expected and array_sum(values) != expected[name]:
            raise kind(f"{path}: '{name}' is not what was written (its checksum differs); {remedy}")


# -- model folders -----------------------------------------------------------------------------------------------------


def _sums_of(files: Iterable[Path]) -> list[int]:
    with ThreadPoolExecutor(4) as pool:  # zlib computes outside the interpreter's lock
        return list(pool.map(file_sum, files))


def write_sums(folder: Path) -> None:
    """Write `checksums.json` for all files of a model folder that is being written."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in EDITABLE)
    names = [path.relative_to(folder).as_posix() for path in files]
    text = json.dumps({KEY: dict(zip(names, _sums_of(files), strict=True))}, indent=1) + "\n"
    (folder / SUMS).write_text(text, encoding="utf-8")


def check_folder(folder: Path, part: str = "", without: tuple[str, ...] = ()) -> None:
    """Compare a model folder's files with its `checksums.json`, if it has one.

    A file that was changed on purpose is accepted once its line is gone from `checksums.json`.

    Args:
        folder: a model folder, or one part of a pipeline folder.
        part: the subfolder to look at; all by default.
        without: subfolders to leave out.

    Raises:
        ModelError: a file is not what was written.
    """
    place = folder / part if part else folder
    for home in (place, place.parent):
        if (home / SUMS).is_file():
            prefix = "" if home == place else f"{place.name}/"
            _check_files(home, prefix, without)
            return


_checked: set[tuple[str, int, int, int]] = set()  # files that this process has found sound, as they were then


def _check_files(home: Path, prefix: str, without: tuple[str, ...]) -> None:
    try:
        expected: dict[str, int] = load_json((home / SUMS).read_text(encoding="utf-8"))[KEY]
        if not all(type(value) is int for value in expected.values()):
            raise ValueError("sums that are no numbers")
        names = [name for name in expected if name.startswith(prefix) and name.partition("/")[0] not in without]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{home / SUMS} is damaged; copy the folder again, or delete this file") from error
    states = {}
    for name in names:
        if (home / name).is_file():
            about = (home / name).stat()
            states[name] = (str(home / name), about.st_size, about.st_mtime_ns, expected[name])
    due = [name for name in states if states[name] not in _checked]
    for name, found in zip(due, _sums_of(home / name for name in due), strict=True):
        if found != expected[name]:
            raise ModelError(
                f"{home / name} is not what was written (its checksum differs); copy or export it again, or, where you "
                f"changed it yourself, delete its line in {home / SUMS}"
            )
        _checked.add(states[name])
