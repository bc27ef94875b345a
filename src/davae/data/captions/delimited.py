"""Rows of `.csv`, `.tsv` and other text with a delimiter."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator
from typing import Any

from davae.errors import DataError


def read_records(
    text: str,
    file: str,
    delimiter: str,
    captions: Collection[str],
    joined: dict[str, int],
    *,
    header: list[str] | None = None,
    quoting: int = csv.QUOTE_MINIMAL,
    needed: Callable[[dict[str, Any]], bool] = bool,
) -> Iterator[dict[str, str | None]]:
    """Yield the rows by column, without loss where a caption contains the delimiter.

    Too many cells of a row that is `needed` belong to the last column, where that is one of `captions` (counted in
    `joined`); else they are a DataError.
    """
    before = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        rows = (cells for cells in reader if any(map(str.strip, cells)))
        header = header or [cell.strip() for cell in next(rows, ())]
        while header and not header[-1]:
            header.pop()
        for cells in rows:
            record: dict[str, str | None] = {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}
            if any(map(str.strip, cells[len(header) :])) and needed(record):
                if header[-1].casefold() not in map(str.casefold, captions):
                    raise DataError(
                        f"{file}, line {reader.line_num}: {len(cells)} cells in the {len(header)} columns "
                        f"{', '.join(header)}; quote the one that contains {delimiter!r}"
                    )
                record[header[-1]] = delimiter.join(cells[len(header) - 1 :]).rstrip(delimiter)
                joined[file] = joined.get(file, 0) + 1
            yield record
    finally:
        csv.field_size_limit(before)
