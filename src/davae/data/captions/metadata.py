"""Columns of `metadata.jsonl`, `.csv`, `.parquet`, the imagefolder convention of `datasets`.

davae reads them itself: `datasets` would copy every image into Arrow files, and the extra `hub` may be missing.
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from davae.data.captions.image_names import ImageNames
from davae.data.captions.texts import GUESSES, MAX_CAPTION, as_json, as_texts, decode_text, read_records, usual_keys
from davae.data.findings import Findings, Tally, add_to
from davae.errors import DataError
from davae.files.reading import load_json

NAME_COLUMNS = ("file_name", "image_file_name")
Rows = Iterator[tuple[int, dict[str, Any]]]  # with their numbers


class Metadata:
    """Records by image, packed into one piece of memory.

    Args:
        rows: image's index -> its record.
        count: images in the source.
        seen: all columns of the files, also those that are not kept.
    """

    def __init__(self, rows: Mapping[int, dict[str, Any]], count: int, seen: Collection[str]):
        parts = [json.dumps(rows[i], default=as_json).encode() if i in rows else b"" for i in range(count)]
        self.ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        self.packed = b"".join(parts)
        self.columns = {column for record in rows.values() for column in record}
        self.seen = list(seen)

    def record(self, index: int) -> dict[str, Any] | None:
        """Return the columns of an image, None where no row names it."""
        start, end = self.ends[index], self.ends[index + 1]
        return load_json(self.packed[start:end]) if end > start else None


def read_metadata_files(
    folder: Path,
    files: list[str],
    names: ImageNames,
    columns: Collection[str],
    findings: Findings,
    unused: dict[str, Tally],
    duplicates: dict[str, Tally],
) -> Metadata:
    """Read metadata files and give each row to its image.

    Args:
        folder: root of the source.
        files: relative paths of the metadata files.
        names: the images.
        columns: columns to keep, besides those that usually hold captions.
        findings: takes guessed encodings.
        unused: counts rows without an image.
        duplicates: counts equal rows.

    Raises:
        DataError: a damaged file, no column `file_name`, too many cells, or two rows of one image with different values
            that are not texts.
    """
    rows: dict[int, dict[str, Any]] = {}
    seen: dict[str, None] = {}
    for file in files:
        for number, row in _rows(folder / file, findings, file, columns):
            seen |= dict.fromkeys(row)
            name = _file_name(row, file)
            index = names.find(posixpath.dirname(file), name)
            if index is None:
                add_to(unused, "row of metadata without an image", f"{file}: {name}")
            if index is None or index >= names.count:
                continue
            kept = [*columns, *(key for key in usual_keys(row) if key not in columns)]
            record = {key: row[key] for key in kept if row.get(key) is not None}
            if index in rows:
                if record == rows[index]:
                    add_to(duplicates, "equal rows of metadata, read once", f"{file}: {name}")
                    continue
                record = _merge(rows[index], record, f"{file}, row {number}: {name}")
            rows[index] = record
    return Metadata(rows, names.count, seen)


def _file_name(row: Mapping[str, Any], file: str) -> str:
    for column in NAME_COLUMNS:
        if isinstance(row.get(column), str):
            return row[column]
    raise DataError(
        f"{file}: a row without the column file_name, found {', '.join(map(str, row)) or 'nothing'}; "
        "name the image of each row in file_name"
    )


def _merge(first: dict[str, Any], second: dict[str, Any], where: str) -> dict[str, Any]:
    """Join two rows of one image: different texts are several captions of it.

    Raises:
        DataError: numbers that differ.
    """
    merged = dict(first)
    for key, value in second.items():
        if key not in first or first[key] == value:
            merged[key] = value
        elif isinstance(value, (str, list)) and isinstance(first[key], (str, list)):
            merged[key] = list(dict.fromkeys([*as_texts(first[key]), *as_texts(value)]))
        else:
            raise DataError(f"{where} has {key} {first[key]} and {value}; keep one row")
    return merged


def _rows(path: Path, findings: Findings, name: str, columns: Collection[str]) -> Rows:
    if path.suffix.lower() == ".csv":
        return _csv_rows(path, findings, name, columns)
    return (_json_rows if path.suffix.lower() == ".jsonl" else _parquet_rows)(path, findings, name)


def _text(path: Path, findings: Findings, name: str) -> str:
    try:
        text, guessed = decode_text(path.read_bytes(), name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if guessed is not None:
        findings.encodings[name] = guessed
    return text


def _json_rows(path: Path, findings: Findings, name: str) -> Rows:
    for number, line in enumerate(_text(path, findings, name).split("\n"), 1):
        if not line.strip().strip("\0"):
            continue
        try:
            row = load_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}); correct or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: found {type(row).__name__} where an object belongs")
        yield number, row


def _csv_rows(path: Path, findings: Findings, name: str, columns: Collection[str]) -> Rows:
    text = _text(path, findings, name)
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # spreadsheets write ; where the comma is the decimal sign
    try:
        rows = read_records(text, name, delimiter, {*columns, *GUESSES}, findings.joined)
        for number, row in enumerate(rows, 2):
            # long enough to be noticed as cut, without megabytes that nobody reads
            yield number, {key: value and value[: 2 * MAX_CAPTION] for key, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path} is not a table of comma-separated values: {error}") from error


def _parquet_rows(path: Path, findings: Findings, name: str) -> Rows:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs `pip install 'davae[hub]'`") from error
    try:
        number = 1
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a parquet file that can be read: {' '.join(str(error).split())[:120]}"
        ) from error
