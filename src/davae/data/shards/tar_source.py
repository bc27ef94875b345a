"""WebDataset shards on disk as an image source, read at random."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from davae.data.captions.file_names import Kind
from davae.data.captions.sidecars import Sidecars
from davae.data.class_folders import classes_of_folders
from davae.data.decoding import decode_image, header_size
from davae.data.findings import Findings, Tally, add_to, printable
from davae.data.options import TABLE_OPTIONS, SourceOptions
from davae.data.shards.copies import cache_folder, plain_shard
from davae.data.shards.tar_index import KINDS, index_shards, read_place
from davae.data.splits import choose_split, split_note, split_points
from davae.errors import DataError

MEMBER = 1 << 31  # bytes of a member that are read at most
PREFIX = 1 << 15  # bytes that are read at a time while a header is looked for
OPEN_SHARDS = 256  # that a process keeps open at most; many systems allow 1,024 files
SMALL = 2 * PREFIX  # bytes of a file that is read whole: a PNG's metadata at both ends takes two reads


class TarSource:
    """WebDataset shards on disk, read at random through an index of 64 bytes a sample.

    Args:
        shards: the files, in order; compressed ones are unpacked once.
        options: the recipe's section `data`.
        cache: where unpacked copies and indexes are kept, by default $DAVAE_CACHE.

    Raises:
        DataError: a shard that cannot be read, no images, or an option that has no meaning here.
    """

    KINDS = KINDS

    def __init__(self, shards: list[Path], options: SourceOptions, cache: Path | None = None):
        self.options = options
        name = ", ".join(str(shard) for shard in shards[:3]) + (", ..." if len(shards) > 3 else "")
        options.refuse(f"the shards {name}", TABLE_OPTIONS)
        duplicates: dict[str, Tally] = {}
        shards = _once_each(shards, duplicates)
        folder = cache or cache_folder()
        self.shards = [plain_shard(shard, folder / "shards") for shard in shards]
        index = index_shards(self.shards, _shard_names(shards), folder / "indexes")
        self.names, self.shard_of, self.places = index.names, index.shard_of, index.places
        self._sparse, unused = index.sparse, index.unused
        notes = self._choose_split(_shard_names(shards), unused)
        if not self.names:
            raise DataError(f"{name}: no images inside{_kinds(unused)}")
        self._token = object()  # open files of this source are its own: a shard may be replaced before the next
        copies = sum(plain != shard for plain, shard in zip(self.shards, shards, strict=True))
        self.findings = Findings(
            "shards",
            unused=unused,
            duplicates={**index.duplicates, **duplicates},
            notes=(f"{copies} compressed shards were unpacked into {self.shards[0].parent}",) if copies else (),
        )
        self.sidecars = Sidecars(options, self, self.findings, name)
        if not index.counts.get("txt"):
            notes += self.sidecars.notes
        self.findings = self.sidecars.findings = replace(
            self.findings, captions_from=self.sidecars.origin(index.counts), notes=(*self.findings.notes, *notes)
        )

    def _choose_split(self, shards: list[str], unused: dict[str, Tally]) -> list[str]:
        """Keep one split where folders in the shards are splits, and return notes on them."""
        before = [len(printable(shard)) + 1 for shard in shards]
        folder_of = [
            name[before[shard] :].rpartition("/")[0]
            for name, shard in zip(self.names, self.shard_of.tolist(), strict=True)
        ]
        paths = {folder: tuple(folder.split("/")) for folder in dict.fromkeys(folder_of) if folder}
        notes = []
        if split_points(paths.values()):
            chosen = choose_split(dict.fromkeys(folder_of), self.options.split, ", ".join(shards[:3]))
            kept = np.asarray([folder in chosen.read for folder in folder_of], bool)
            for name, folder in zip(self.names, folder_of, strict=True):
                if folder in chosen.left:
                    add_to(unused, f"image {chosen.left[folder]}", name)
            self.names = [name for name, own in zip(self.names, kept, strict=True) if own]
            self.shard_of, self.places = self.shard_of[kept], self.places[kept]
            paths = chosen.read
            notes.append(split_note(self.options.split))
        if classes_of_folders(paths):
            shown = ", ".join(list(paths)[:3])
            notes.append(
                f"the folders inside the shards ({shown}) are neither captions nor classes; unpack them to have both"
            )
        return notes

    def _file(self, shard: int) -> _File:
        return _open_shard(self._token, self.shards[shard])

    def sidecar(self, index: int, kind: Kind | str, limit: int = MEMBER) -> bytes | None:
        """Return at most `limit` bytes of a member, None where the sample has none of the kind."""
        offset, size = (int(value) for value in self.places[index, KINDS.index(kind)])
        if offset < 0:
            return None
        shard = int(self.shard_of[index])
        # forked workers share an open file's position, so none is used
        file = self._file(shard)
        return read_place(file.descriptor, offset, size, self._sparse.get((shard, offset)), limit)

    def sidecar_name(self, index: int, kind: Kind) -> str:
        return f"{self.names[index]}.{kind}"

    def _image(self, index: int) -> IO[bytes]:
        """Return the image as a file of which only the parts that are used are read."""
        offset, size = (int(value) for value in self.places[index, 0])
        shard = int(self.shard_of[index])
        if (shard, offset) in self._sparse or size <= SMALL:
            return io.BytesIO(self.sidecar(index, "picture") or b"")
        return io.BufferedReader(_Part(partial(self._file, shard), offset, size), PREFIX)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self._image(index), self.options.max_pixels, self.options.float_pixels)

    def stamp(self, index: int) -> bytes:
        return str(self.places[index, 0, 1]).encode()

    def length(self, index: int) -> int:
        return int(self.places[index, 0, 1])

    def parts(self, index: int, stretches: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        begin, length = (int(value) for value in self.places[index, 0])
        shard = int(self.shard_of[index])
        whole = (self.sidecar(index, "picture") or b"") if (shard, begin) in self._sparse else None
        for offset, size in stretches:
            if whole is None:
                file = self._file(shard)
                yield os.pread(file.descriptor, max(0, min(size, length - offset)), begin + offset)
            else:
                yield whole[offset : offset + size]

    def identity(self, index: int) -> bytes:
        """Return the file's size and what belongs to the image, as earlier versions did."""
        with self.sidecars.reading_once():
            own = str(self.places[index, 0, 1]).encode() + b"\0" + self.sidecars.identity(index)
            return own + self.sidecars.changed_caption(index, "", self.sidecars.caption_or_fault(index))

    def label(self, index: int) -> int | None:
        return self.sidecars.label(index)

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        return self.sidecars.caption(index, rng) or ""

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        text = self.caption(index, rng)
        stream = io.BytesIO(self.sidecar(index, "picture") or b"")
        return decode_image(stream, self.options.background, self.options.max_pixels, self.options.float_pixels), text


class _File:
    """An open file, closed when nothing refers to it. Readers keep it through an eviction."""

    def __init__(self, path: Path):
        self._stream = path.open("rb", buffering=0)
        self.descriptor = self._stream.fileno()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()


@lru_cache(OPEN_SHARDS)
def _open_shard(token: object, path: Path) -> _File:
    """Return a source's open shard, one of the latest of this process."""
    return _File(path)


class _Part(io.RawIOBase):
    """A stretch of an open file, read by place: forked workers share the file's own position.

    Args:
        file: returns the open file, which others may have closed meanwhile.
        offset: first byte.
        size: bytes.
    """

    def __init__(self, file: Callable[[], _File], offset: int, size: int):
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.size - self.position))
        file = self.file()
        data = os.pread(file.descriptor, wanted, self.offset + self.position) if wanted else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _once_each(shards: list[Path], duplicates: dict[str, Tally]) -> list[Path]:
    """Return each file once: patterns overlap, links lead to shards that are named already."""
    kept: dict[str, Path] = {}
    for shard in shards:
        if kept.setdefault(os.path.realpath(shard), shard) is not shard:
            add_to(duplicates, "shard that is named twice, read once", str(shard))
    return list(kept.values())


def _shard_names(shards: list[Path]) -> list[str]:
    """Return a unique name of each shard: its file name, with folders where two are equal."""
    times = Counter(shard.name for shard in shards)
    if max(times.values(), default=1) == 1:
        return [shard.name for shard in shards]
    shared = os.path.commonpath([os.path.abspath(shard.parent) for shard in shards])
    return [
        shard.name if times[shard.name] == 1 else Path(os.path.relpath(os.path.abspath(shard), shared)).as_posix()
        for shard in shards
    ]


def _kinds(unused: dict[str, Tally]) -> str:
    return f"; found {', '.join(f'{tally.count} {kind}' for kind, tally in unused.items())}" if unused else ""
