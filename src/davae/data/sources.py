"""Image sources by the name in `data.source`: what is there decides how it is opened."""

from __future__ import annotations

import glob
import os
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from davae.data.captions.file_names import METADATA, is_hidden
from davae.data.findings import Findings, Tally, add_to
from davae.data.folder import FolderSource, walk
from davae.data.formats import is_image_name, unused_kind
from davae.data.images import ImageSource
from davae.data.npz import NpzSource
from davae.data.options import TABLE_OPTIONS, SourceOptions
from davae.data.shards.commands import PIPE
from davae.data.shards.names import expand_braces, expand_shards, is_shard, literal_folder, matching, shards_in
from davae.data.shards.remote import fetch_shard, glob_url, is_remote, open_stream
from davae.data.shards.tar_source import TarSource
from davae.data.splits import files_of_split, refuse_split, split_note
from davae.data.tables import TableSource, holds_images, is_saved_table, nearest_file
from davae.errors import DataError


def open_source(name: str, resolution: int, options: SourceOptions | None = None) -> ImageSource:
    """Open the source that a recipe's `data.source` names.

    Args:
        name: `openmoji` or `openmoji-all`; a folder of images, shards or parquet files; a `.tar` or shard pattern, also
            behind `pipe:` or a URL that fsspec reads (`hf://datasets/...`, `https://...`); `.parquet` files; an ADM
            `.npz`; or a Hugging Face dataset id.
        resolution: pixels that images will be sized to; OpenMoji is rendered large enough.

    Raises:
        DataError: when there is nothing there, or an option has no meaning there.
    """
    options = options or SourceOptions()
    check_name(name)
    if name in ("openmoji", "openmoji-all"):
        from davae.data.openmoji import OpenMoji

        options.refuse("OpenMoji", ("caption_key", "caption_weights", "label_key", "split", *TABLE_OPTIONS))
        return OpenMoji(resolution, everything=name == "openmoji-all")
    if name.startswith(PIPE) or (is_remote(name) and not name.endswith(".parquet")):
        return TarSource([fetch_shard(one) for url in expand_braces(name) for one in glob_url(url)], options)
    if os.path.isdir(name):  # unlike Path's, no error for a pattern longer than a name may be
        return open_folder(Path(name), options)
    if is_shard(name):
        return TarSource(expand_shards(name), options)
    if name.endswith(".npz") and os.path.isfile(name):
        refuse_split(options.split, name, name)
        return NpzSource(Path(name), options)
    if name.endswith(".parquet") and (is_remote(name) or (found := matching(name))):
        refuse_split(options.split, name, name)
        literal = not is_remote(name) and (os.path.isfile(name) or glob.has_magic(literal_folder(name)))
        return open_table(name, options, found if literal and glob.has_magic(name) else None)
    if os.path.isfile(name):
        return open_file(Path(name), options)
    if glob.has_magic(name) and (found := glob.glob(name)):
        raise DataError(
            f"data.source: {name} names {len(found)} files; patterns are for .tar and .parquet files, give the folder of "
            f"images: {Path(found[0]).parent}"
        )
    if name.startswith((".", "/", "~")) or Path(name).suffix:
        raise DataError(f"data.source: {name} does not exist{nearest_file(name)}")
    return open_table(name, options)


def check_name(name: str) -> None:
    """Refuse an empty name, as of an unset shell variable: it would mean the current folder.

    Raises:
        DataError: in one line.
    """
    if not name.strip():
        raise DataError("data.source: the name is empty; give a folder, a shard, a table or a dataset id")


def open_folder(folder: Path, options: SourceOptions) -> ImageSource:
    """Open loose images, or the `.tar` shards or `.parquet` files that lie directly in a folder.

    Raises:
        DataError: several of them, where it is not plain which is meant.
    """
    if is_saved_table(folder):
        return TableSource(str(folder), options)
    shards, tables = shards_in(folder), tables_in(folder)
    if tables and not holds_images(tables[0], options.image_column):  # img2dataset's lists of addresses
        below = (name for names in walk(folder, {}).values() for name in names)
        tables = [] if shards or any(is_image_name(name) for name in below) else tables
    deep = not shards and not tables
    if deep:
        shards, tables = packed_below(folder, options.image_column)
    if not shards and not tables:
        return FolderSource(folder, options)
    loose = next((p for p in folder.iterdir() if is_image_name(p.name) and not is_hidden(p.name)), None)
    pattern = f"{folder}/{'**/' if deep else ''}*"
    if loose is not None:
        raise DataError(
            f"folder {folder} holds shards and loose images ({loose.name}); name the shards: "
            f"{folder}/*.{'tar' if shards else 'parquet'}"
        )
    if shards and tables:
        raise DataError(
            f"folder {folder} holds shards and tables with images ({tables[0].name}); name one: {pattern}.tar or "
            f"{pattern}.parquet"
        )
    unused: dict[str, Tally] = {}
    files = files_of_split(shards or tables, options.split, folder, unused)
    _count_others(folder, {*shards, *tables}, unused, deep)
    source = TarSource(files, options) if shards else open_table(f"{pattern}.parquet", options, files)
    return with_unused(source, unused, len(files) < len(shards or tables), options.split)


def packed_below(folder: Path, image_column: str) -> tuple[list[Path], list[Path]]:
    """Return the shards and the tables below a folder without loose images."""
    files = [folder / at / name for at, names in walk(folder, {}).items() for name in names]
    if any(is_image_name(path.name) for path in files):
        return [], []
    shards = [path for path in files if is_shard(path.name)]
    tables = [path for path in files if path.suffix == ".parquet" and path.name.lower() not in METADATA]
    return sorted(shards), sorted(tables) if tables and holds_images(tables[0], image_column) else []


def tables_in(folder: Path) -> list[Path]:
    """Return the `.parquet` files directly in a folder, in order, without metadata files."""
    return sorted(
        path
        for path in folder.glob("*.parquet")
        if not is_hidden(path.name) and path.name.lower() not in METADATA and not path.is_dir()
    )


def open_table(name: str, options: SourceOptions, files: Sequence[Path] | None = None) -> ImageSource:
    """Open a table, or the first data.limit rows of a stream."""
    return (open_stream if options.streaming else TableSource)(name, options, files)


def _count_others(folder: Path, read: set[Path], unused: dict[str, Tally], deep: bool) -> None:
    """Count whatever lies next to the files: lists of addresses, statistics, folders."""
    if deep:
        for at, names in walk(folder, unused).items():
            for name in names:
                if folder / at / name not in read:
                    add_to(unused, unused_kind(name), f"{at}/{name}" if at else name)
        return
    for path in sorted(folder.iterdir()):
        if path in read:
            continue
        if is_hidden(path.name):
            add_to(unused, "hidden file", path.name)
        else:
            add_to(unused, "folder next to shards or tables" if path.is_dir() else unused_kind(path.name), path.name)


def with_unused(source: ImageSource, unused: dict[str, Tally], split: bool, wanted: str) -> ImageSource:
    """Return the source with what is not read in its findings."""
    found: Findings = source.findings
    notes = (split_note(wanted),) if split else ()
    merged = {kind: Tally(tally.count, list(tally.names)) for kind, tally in found.unused.items()}
    for kind, tally in unused.items():
        own = merged.setdefault(kind, Tally())
        own.count, own.names = own.count + tally.count, [*own.names, *tally.names]
    source.findings = replace(found, unused=merged, notes=(*found.notes, *notes))  # type: ignore[misc]
    return source


def open_file(path: Path, options: SourceOptions) -> ImageSource:
    """Open a file whose name does not show what it is: a tar by its content.

    Raises:
        DataError: anything else, with what to give.
    """
    try:
        is_tar = tarfile.is_tarfile(path)
    except OSError as error:
        raise DataError(f"data.source: {path} cannot be read: {error.strerror or error}") from error
    if is_tar:
        return TarSource([path], options)
    if is_image_name(path.name):
        what = "one image; give the folder of the images"
    elif zipfile.is_zipfile(path):
        what = "a zip archive; unpack it and give the folder"
    else:
        what = "a file that is not a shard; give a folder of images, a .tar, a .parquet or an .npz"
    raise DataError(f"data.source: {path} is {what}")
