"""Prompts from the files in which benchmarks keep them."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.data.captions.texts import MAX_CAPTION, SURROGATE, decode_text, read_records
from davae.errors import DataError
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "Prompt", "p", "caption", "text")  # what benchmarks call it; `p` is DiffusionDB's


@dataclass(frozen=True)
class Prompt:
    """A prompt with its key in the file (MJHQ's image id, a line's number) and its whole entry."""

    text: str
    name: str
    record: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> list[Prompt]:
    """Return all prompts of a file, in its order.

    `.txt`: one a line. `.tsv`, `.csv` (PartiPrompts): a column. `.jsonl` (GenEval): an object or a text a line. `.json`
    (MJHQ-30K's `meta_data.json`, DiffusionDB's `part-*.json`): an object per name, or a list of objects or texts.
    `.parquet` (DiffusionDB's `metadata.parquet`): a column, through pyarrow.

    Raises:
        DataError: no such file, another format, no prompts in it.
    """
    if not path.is_file():
        raise DataError(f"prompt file {path} does not exist")
    tables = {".txt": _lines, ".tsv": _table, ".csv": _table}
    readers = {**tables, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    ending = path.suffix.lower()
    if ending not in readers:
        raise DataError(f"prompt file {path}: unknown format '{path.suffix}'; there are {', '.join(readers)}")
    try:
        entries = readers[ending](path)
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        raise DataError(f"prompt file {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    prompts = [Prompt(_text(entry, path), name, entry if isinstance(entry, dict) else {}) for name, entry in entries]
    prompts = [prompt for prompt in prompts if prompt.text.strip()]
    long = next((prompt for prompt in prompts if len(prompt.text) > MAX_CAPTION), None)
    if long is not None:
        raise DataError(
            f"prompt file {path}: prompt {long.name} has {len(long.text):,} characters; at most {MAX_CAPTION:,} are taken"
        )
    broken = next((prompt for prompt in prompts if SURROGATE.search(prompt.text)), None)
    if broken is not None:
        raise DataError(
            f"prompt file {path}: prompt {broken.name} holds half a character (a lone surrogate): {broken.text!r:.60}"
        )
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompts")
    return prompts


def _text(record: Any, path: Path) -> str:
    if isinstance(record, str):  # of a JSON list or lines of JSON
        return record
    if not isinstance(record, dict):
        raise DataError(f"prompt file {path}: found {str(record)[:60]!r} where a text or an object belongs")
    for column in COLUMNS:
        if column in record:
            return "" if record[column] is None else str(record[column])  # no prompt is not the prompt "None"
    raise DataError(
        f"prompt file {path}: no column {' or '.join(COLUMNS)}, found {', '.join(map(str, record))[:200] or 'none'}"
    )


def _decoded(path: Path) -> str:
    """Return a file's text in any encoding of caption files, and log a guess."""
    text, guessed = decode_text(path.read_bytes(), path.name)
    if guessed is not None:
        logger.warning("prompt file %s is not UTF-8; it is read as %s", path, guessed)
    return text


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = io.StringIO(_decoded(path), newline=None)  # `splitlines` would cut at U+2028, too
    return [(str(number), {"prompt": line.rstrip("\n")}) for number, line in enumerate(lines)]


def _table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = read_records(_decoded(path), path.name, delimiter, COLUMNS, {})
    return [(str(number), row) for number, row in enumerate(rows)]


def _json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = io.StringIO(_decoded(path), newline=None)
    return [(str(number), load_json(line)) for number, line in enumerate(lines) if line.strip()]


def _json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    values = load_json(_decoded(path))
    if isinstance(values, dict):
        return list(values.items())
    if not isinstance(values, list):
        raise ValueError(f"found {type(values).__name__} where an object or a list belongs")
    return [(str(number), value) for number, value in enumerate(values)]


def _parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"prompt file {path}: reading .parquet needs `pip install 'davae[hub]'`") from error
    file = ParquetFile(path)
    wanted = [name for name in file.schema_arrow.names if name in (*COLUMNS, "image_name")]
    rows = file.read(columns=wanted).to_pylist()
    return [(str(row.get("image_name", number)), row) for number, row in enumerate(rows)]
