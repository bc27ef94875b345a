"""Tables with an image column: Hugging Face datasets and parquet files (the `hub` extra)."""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from davae.data.captions.texts import as_label, choose, clean, usual_keys
from davae.data.decoding import OF_THE_FILE, decode_image, header_size
from davae.data.findings import Findings
from davae.data.options import SourceOptions
from davae.data.splits import refuse_split, split_note, table_of_split
from davae.errors import DataError

SHOWN = 12  # columns in a note
ENDS = 1 << 16  # bytes of a parquet file's beginning and end that are hashed
IMAGE_TYPES = re.compile(  # of Arrow, that `datasets` reads as images
    r"null|(large_)?(binary|string)|struct<(?!.*\b(bytes|path): (?!(large_)?(binary|string)|null))(.*, )?(bytes|path): .*>"
    r"|(list<\w+: )+(u?int\d+|halffloat|float|double)>+|extension<.*>"
)


def holds_images(path: Path, column: str) -> bool:
    """Return whether a parquet file has the column, True where that is not known."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import read_schema
    except ImportError:
        return True
    try:
        return column in read_schema(path).names
    except (pa.ArrowException, OSError, ValueError):
        return True


def is_saved_table(folder: str | Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote a folder."""
    several, *one = (
        os.path.isfile(os.path.join(folder, name))
        for name in ("dataset_dict.json", "state.json", "dataset_info.json")
    )
    return several or all(one)


def unread_note(columns: Sequence[str]) -> str:
    """Return a sentence on the columns that are not read."""
    shown = ", ".join(columns[:SHOWN]) + (", ..." if len(columns) > SHOWN else "")
    return f"columns that are not read: {shown}; data.caption_column and data.label_column name one"


def load_rows(
    name: str,
    options: SourceOptions,
    *,
    streaming: bool = False,
    files: Sequence[Path] | None = None,
    notes: list[str] | None = None,
) -> Any:
    """Open a hub id, a folder of `datasets`, or parquet files, with images left as bytes.

    Args:
        name: what `data.source` calls them.
        options: the recipe's section `data`.
        streaming: read row by row.
        files: the parquet files, where they are not all that the name matches.
        notes: takes sentences on splits and columns that are not read.

    Raises:
        DataError: no dataset there, or an image column that it does not have.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.source '{name}': Hugging Face datasets need `pip install 'davae[hub]'`") from error
    rows = _open_rows(name, options, streaming, name if files is None else [glob.escape(str(path)) for path in files])
    if isinstance(rows, dict):  # of `save_to_disk`
        notes = [] if notes is None else notes
        notes += [split_note(options.split)] if len(rows) > 1 else []
        rows = table_of_split(rows, options.split, name)
    elif is_saved_table(name):
        refuse_split(options.split, name, rows.split or "")
    columns = rows.column_names
    if columns is None:  # a stream without a schema: the first row has its columns
        columns = list(next(iter(rows)))
    wanted = {"image_column": options.image_column} | {
        option: value
        for option in ("caption_column", "label_column")
        if (value := getattr(options, option)) is not None
    }
    for option, column in [*wanted.items(), *(("caption_weights", key) for key in options.caption_weights)]:
        if column not in columns:
            raise DataError(f"data.{option} '{column}' is not in {name}; it has {', '.join(columns)}")
    kept = [*wanted.values(), *options.caption_weights, *usual_keys(columns)]
    rows = rows.select_columns(list(dict.fromkeys(kept)))
    unread = [column for column in columns if column not in kept]
    if unread and notes is not None:
        notes.append(unread_note(unread))
    kind = str(rows.features.arrow_schema.field(options.image_column).type) if rows.features else "null"
    if not IMAGE_TYPES.fullmatch(kind):
        raise DataError(
            f"data.image_column '{options.image_column}' of {name} holds {kind}; images are binary (the file), string (its "
            "path), struct<bytes: binary, path: string>, or lists of pixels"
        )
    return rows.cast_column(options.image_column, datasets.Image(decode=False))


def _open_rows(name: str, options: SourceOptions, streaming: bool, files: str | list[str]) -> Any:
    """Open a dataset with `datasets`, or raise a DataError with the reason."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        if is_saved_table(name):
            return datasets.load_from_disk(name)
        if name.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        return datasets.load_dataset(name, options.config, split=options.split, streaming=streaming)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if name.endswith(".parquet") or is_saved_table(name):
            raise DataError(f"data.source: {name} cannot be read as a table: {reason}") from error
        raise DataError(
            f"data.source '{name}' is not a file or folder here{nearest_file(name)}, and the hub gave no dataset: "
            + re.sub(r"( on the Hub) \(\w+\)$", r"\1", reason)
        ) from error


def nearest_file(name: str) -> str:
    """Return the question after a file or folder of a similar name, '' without one."""
    folder, last = os.path.split(name.rstrip("/"))
    try:
        close = difflib.get_close_matches(last, os.listdir(folder or "."), n=1, cutoff=0.75)
    except OSError:
        return ""
    return f" (did you mean {os.path.join(folder, close[0])}?)" if close else ""


def column_weights(columns: list[str], options: SourceOptions) -> dict[str, float]:
    """Return the caption columns and their weights: the named ones, else a usual one."""
    if options.caption_weights:
        return dict(options.caption_weights)
    if options.caption_column is not None:
        return {options.caption_column: 1.0}
    return dict.fromkeys(usual_keys(columns)[:1], 1.0)


def cell_bytes(cell: dict[str, Any] | None) -> bytes:
    """Return the bytes of an undecoded image cell, of a path or address too, or b'' for no file.

    Raises:
        DataError: a file or address that may be read later.
    """
    if cell is None or cell["bytes"] is not None or cell["path"] is None:
        return b"" if cell is None else cell["bytes"] or b""
    import fsspec

    try:
        with fsspec.open(cell["path"], "rb") as stream:
            return stream.read()  # type: ignore[union-attr]
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in OF_THE_FILE):
            return b""
        raise DataError(f"data.source: the image {cell['path']} cannot be read: {error}") from error


def table_content(name: str, files: Sequence[Path] | None = None) -> bytes | None:
    """Return a hash of local parquet files, by names, sizes and both ends.

    Touching or copying them changes nothing.

    Args:
        name: a path or pattern; None comes back for anything else.
        files: the files, where they are not all that the name matches.
    """
    paths = list(files or ())
    if not paths and name.endswith(".parquet"):
        paths = sorted(Path(path) for path in glob.glob(name))
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as stream:
            ends = stream.read(ENDS)
            stream.seek(max(0, size - ENDS))
            ends += stream.read(ENDS)
        digest.update(f"{path.name} {size} ".encode() + hashlib.sha256(ends).digest())
    return digest.hexdigest()[:16].encode()


class TableSource:
    """Rows read at random from the Arrow files that `datasets` maps from disk."""

    def __init__(self, name: str, options: SourceOptions, files: Sequence[Path] | None = None):
        options.refuse("a table", ("caption_key", "label_key"))
        notes: list[str] = []
        self.rows = load_rows(name, options, files=files, notes=notes)
        self.name, self.options = name, options
        self.weights = column_weights(self.rows.column_names, options)
        texts = list(self.weights) + ([options.label_column] if options.label_column else [])
        feature = self.rows.features.get(options.label_column) if self.rows.features else None
        self.findings = Findings(
            "table",
            ", ".join(f"column {column}" for column in self.weights) or "none",
            class_names=tuple(getattr(feature, "names", None) or ()),
            notes=tuple(notes),
        )
        self._content = table_content(name, files)
        self.plain = self.rows.select_columns(texts) if texts else None  # without the images

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """Return the name of a row, without the folder, so that a copy has the same split."""
        return f"{Path(self.name).name if Path(self.name).is_absolute() else self.name}/{index}"

    def _stream(self, index: int) -> io.BytesIO | Path:
        cell = self.rows[index][self.options.image_column]
        if cell is not None and cell["bytes"] is None and cell["path"] is not None:
            return Path(cell["path"])
        return io.BytesIO(b"" if cell is None else cell["bytes"])

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self._stream(index), self.options.max_pixels, self.options.float_pixels)

    def stamp(self, index: int) -> bytes:
        return self.identity(index)

    def identity(self, index: int) -> bytes:
        """Return a hash of the whole table, which `datasets` keeps for one of the hub."""
        return self._content or str(self.rows._fingerprint).encode()

    def former(self, index: int) -> tuple[bytes, bytes]:
        """Return name and identity as earlier versions hashed them, with path and time."""
        return f"{self.name}/{index}".encode(), str(self.rows._fingerprint).encode()

    def label(self, index: int) -> int | None:
        column = self.options.label_column
        if column is None or self.plain is None:
            return None
        return as_label(self.plain[index][column], self.key(index))

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        if self.plain is None:
            return ""
        return clean(choose(self.plain[index], self.weights, rng), self.key(index), self.findings)

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        image = decode_image(
            self._stream(index), self.options.background, self.options.max_pixels, self.options.float_pixels
        )
        return image, self.caption(index, rng)
