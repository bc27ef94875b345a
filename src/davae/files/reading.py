"""Files of any origin, read within bounds or refused in one line, for all of davae."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from davae.errors import DavaeError, ModelError

MAX_JSON = 64 << 20  # the largest known, tokenizers of language models, have half of it


def load_json(text: str | bytes) -> Any:
    """Return the value of JSON text, for callers with a message of their own.

    Raises:
        ValueError: not JSON, not UTF-8, or nested so deeply that the parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def whole_number(value: Any) -> int:
    """Return a whole number as JSON has it.

    Raises:
        ValueError: another kind of value, such as 1.5, true, "1" or Infinity.
    """
    if type(value) is not int:
        raise ValueError(f"found {str(value)[:40]!r} where a whole number belongs")
    return value


def read_text(path: Path, error: type[DavaeError] = ModelError, limit: int = MAX_JSON) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file, named in messages.
        error: the kind of error to raise.
        limit: largest size in bytes.

    Raises:
        DavaeError: of kind `error`: missing, unreadable, not a file, too large or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: not a file")
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise error(f"{path}: more than {limit >> 20} MiB; this is not the file that davae looks for")
        return data.decode("utf-8-sig")
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist") from missing
    except OSError as failed:
        raise error(f"{path} cannot be read: {failed.strerror or failed}") from failed
    except UnicodeDecodeError as bad:
        raise error(f"{path}: byte {bad.start} is not UTF-8 text; the file is damaged, get it again") from bad


def read_json(path: Path, error: type[DavaeError] = ModelError, limit: int = MAX_JSON) -> Any:
    """Read a JSON file.

    Args:
        path: the file, named in messages.
        error: the kind of error to raise.
        limit: largest size in bytes.

    Raises:
        DavaeError: of kind `error`: a file that `read_text` refuses, or not JSON.
    """
    return parse_json(read_text(path, error, limit), f"{path}", error)


def read_object(path: Path, error: type[DavaeError] = ModelError, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DavaeError: of kind `error`: as `read_json`, or a list or plain value.
    """
    values = read_json(path, error, limit)
    if not isinstance(values, dict):
        raise error(f"{path}: found a {type(values).__name__} where a JSON object belongs; the file is damaged")
    return values


def parse_json(text: str, what: str, error: type[DavaeError] = ModelError) -> Any:
    """Read JSON text.

    Args:
        what: names the text in messages.

    Raises:
        DavaeError: of kind `error`: not JSON, nested without end, or with a number of thousands of digits.
    """
    try:
        return load_json(text)
    except ValueError as bad:
        raise error(f"{what}: not valid JSON ({' '.join(str(bad).split())[:160]}); the file is damaged") from bad


def recipe_file(folder: Path, remedy: str) -> Path:
    """Return the recipe of a run folder.

    Args:
        remedy: what to give instead, for the message.

    Raises:
        ModelError: no such folder, or one of something else.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        found = "it is not a run folder, it has no recipe.yaml" if folder.exists() else "there is no such folder"
        raise ModelError(f"{folder}: {found}; {remedy}")
    return file
