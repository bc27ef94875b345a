"""Remote images, copied once into local shards: `pipe:`, URLs of fsspec, streamed datasets.

Training reads at random, so a run can be resumed and shared between processes without repeating or losing an image;
a stream cannot do that. A shard is copied whole or not at all, and a copy that was cut off goes on at its last whole
shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec

from davae.data.captions.texts import as_json
from davae.data.decoding import naming_damage
from davae.data.formats import open_image
from davae.data.options import SourceOptions
from davae.data.shards.commands import PIPE, open_command
from davae.data.shards.copies import cache_folder, once, unpack_in_place
from davae.data.shards.tar_index import index_tar
from davae.data.shards.tar_source import TarSource
from davae.data.tables import cell_bytes, column_weights, load_rows, table_content
from davae.errors import DataError, UnreadableImage
from davae.files.atomic import atomic_text
from davae.files.reading import read_object

logger = logging.getLogger(__name__)

REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://")
LOCAL = re.compile(r"(?:file|local)://")
SHARD_SIZE = 1000  # images of a streamed dataset in one local shard


def is_remote(name: str) -> bool:
    return REMOTE.match(name) is not None


def local_stamp(name: str, files: Sequence[Path] | None = None) -> tuple[str, ...]:
    """Return place and content of local files, () for an address elsewhere.

    Another project may have other files under the same relative name, and a file may be written again.

    Args:
        name: a command behind `pipe:`, an address, a path or a pattern.
        files: the files, where they are not all that the name matches.

    Raises:
        DataError: a file that cannot be read.
    """
    if name.startswith(PIPE):
        return (os.getcwd(),)
    path = LOCAL.sub("", name, count=1)
    if is_remote(path):
        return ()
    try:
        content = table_content(path, files)
    except OSError as error:
        raise DataError(f"data.source: cannot read {name}: {error.strerror or error}") from error
    return () if content is None else (*(os.path.abspath(one) for one in files or [path]), content.decode())


def fetch_shard(url: str) -> Path:
    """Return the local copy of one shard.

    Raises:
        DataError: a command that fails, an address that cannot be read, or anything but a whole tar file.
    """
    name = re.sub(r"[^\w.-]+", "-", url.rpartition("/")[2])[-60:]
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = cache_folder() / "shards"
    if stamp := local_stamp(url, [Path(LOCAL.sub("", url))] if LOCAL.match(url) else None):
        # not in the file's name, which is part of the images' names
        folder /= hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
    target = folder / f"{digest}-{name.removesuffix('.tar')}.tar"

    def copy(partial: Path) -> None:
        logger.info("copying %s to %s", url, target)
        try:
            with open_url(url) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"data.source: cannot read {url}: {' '.join(str(error).split())[:200]}") from error
        unpack_in_place(partial)
        index_tar(partial)

    try:
        return once(target, copy)
    except DataError as error:
        raise DataError(f"data.source {url}: {error}") from error


def open_url(url: str) -> Any:
    """Open a stream of bytes: what the programs behind `pipe:` write, else what fsspec reads."""
    return open_command(url.removeprefix(PIPE)) if url.startswith(PIPE) else fsspec.open(url, "rb")


def glob_url(url: str) -> list[str]:
    """Return the addresses that a pattern with * matches, in order, or a plain address."""
    if url.startswith(PIPE) or "*" not in url:
        return [url]
    try:
        files = fsspec.open_files(url, "rb")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"data.source: cannot list {url}: {' '.join(str(error).split())[:200]}") from error
    protocol = url.partition("://")[0]
    absolute = url.startswith(f"{protocol}:///")
    found = [f"{protocol}://{file.path if absolute else file.path.lstrip('/')}" for file in files]
    if not found:
        raise DataError(f"data.source: no shard matches {url}")
    return sorted(found)


def open_stream(name: str, options: SourceOptions, files: Sequence[Path] | None = None) -> TarSource:
    """Open the first `limit` rows of a streamed dataset, copied into local shards.

    Args:
        name: what `data.source` calls it.
        options: the recipe's section `data`.
        files: the parquet files, where they are not all that the name matches.

    Raises:
        DataError: without a limit.
    """
    options.refuse("a table", ("caption_key", "label_key"))
    if options.limit is None:
        raise DataError("data.streaming needs data.limit: how many images to take from the stream")
    parts = (name, options.config, options.split, options.image_column, options.caption_column, options.label_column)
    parts = (*parts, sorted(options.caption_weights), *local_stamp(name, files))
    kind = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    folder = cache_folder() / "streams" / kind
    starts = range(0, options.limit, SHARD_SIZE)
    targets = [folder / f"{s:09d}-{min(SHARD_SIZE, options.limit - s):04d}.tar" for s in starts]
    missing = [n for n, target in enumerate(targets) if not target.is_file()]
    weights_file = folder / "columns.json"
    if missing or not weights_file.is_file():
        rows = load_rows(name, options, streaming=True, files=files)
        columns = rows.column_names or list(next(iter(rows)))
        atomic_text(weights_file, json.dumps(column_weights(columns, options)))
        stream: Iterator[Any] = iter(rows.skip(missing[0] * SHARD_SIZE)) if missing else iter(())
        for n in range(missing[0] if missing else len(targets), len(targets)):
            wanted = min(SHARD_SIZE, options.limit - starts[n])
            part = list(islice(stream, wanted))
            if len(part) < wanted:
                raise DataError(
                    f"data.source '{name}' gave {starts[n] + len(part)} images, data.limit is {options.limit}"
                )
            once(targets[n], lambda path, part=part, first=starts[n]: write_rows(path, part, first, options))
    weights = options.caption_weights or read_object(weights_file, DataError)
    local = replace(
        options, caption_weights=weights, label_key=options.label_column, caption_column=None, label_column=None,
        config=None, streaming=False,
    )  # fmt: skip
    return TarSource(targets, local)


def write_rows(path: Path, rows: list[dict[str, Any]], first: int, options: SourceOptions) -> None:
    """Write rows as WebDataset samples: the image's bytes, and other columns as `.json`.

    Args:
        path: the shard.
        rows: dicts by column.
        first: number of the first row.
        options: the recipe's section `data`.
    """
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows, first):
            data = cell_bytes(row.pop(options.image_column))
            add_member(archive, f"{number:09d}.{image_suffix(data)}", data)
            add_member(archive, f"{number:09d}.json", json.dumps(row, default=as_json).encode())


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file with a fixed date, so that equal contents make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def image_suffix(data: bytes) -> str:
    """Return png, webp, ... by the bytes, or jpg for no image, which is counted later."""
    try:
        with naming_damage(), open_image(io.BytesIO(data)) as image:
            name = (image.format or "").lower()
    except UnreadableImage:
        return "jpg"
    return name if name in ("png", "webp", "gif", "bmp", "tiff") else "jpg"
