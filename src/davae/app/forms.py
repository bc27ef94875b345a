"""Checks of a visitor's input: a request can hold anything, not only what the fields offer.

Every handler of the page passes its arguments through here. Nothing in this module knows Gradio.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from davae.errors import DavaeError

Choice = TypeVar("Choice")
PATHS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/:;,'\"()<>]+/)*(?=[^\s/:;,'\"()<>]*)")
MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
SHOWN = 60  # characters of a wrong value that an answer repeats
LINE = 400  # characters of an answer


class FormError(DavaeError, ValueError):
    """Field of the page with an invalid value, in one readable line."""


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number between two bounds, both included.

    Args:
        name: of the field, for the message.
        value: from the request.
        low, high: bounds.

    Raises:
        FormError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:  # NaN and infinity too
        raise FormError(f"{name}: {excerpt(value)} is not a whole number; the page takes {low:,} to {high:,}")
    if not low <= value <= high:
        raise FormError(f"{name} is {excerpt(int(value))}; the page takes {low:,} to {high:,}")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """Return a finite number between two bounds, both included.

    Args:
        name: of the field, for the message.
        value: from the request.
        low, high: bounds.

    Raises:
        FormError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise FormError(f"{name}: {excerpt(value)} is not a number; the page takes {low:g} to {high:g}")
    if not low <= value <= high:
        raise FormError(f"{name} is {excerpt(value)}; the page takes {low:g} to {high:g}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return a switch.

    Args:
        name: of the field, for the message.
        value: from the request.

    Raises:
        FormError: anything but true and false.
    """
    if not isinstance(value, bool):
        raise FormError(f"{name}: {excerpt(value)} is not a switch; send true or false")
    return value


def one_of(name: str, value: Any, known: Sequence[Choice]) -> Choice:
    """Return the choice that equals a value.

    Args:
        name: of the field, for the message.
        value: from the request.
        known: choices.

    Raises:
        FormError: it is not a choice.
    """
    for choice in known:
        if type(value) is type(choice) and value == choice:
            return choice
    few = ", ".join(str(choice) for choice in known[:8]) + (", ..." if len(known) > 8 else "")
    raise FormError(f"{name}: {excerpt(value)} is not a choice; use {few or 'nothing: there is none'}")


def some_of(name: str, value: Any, known: Sequence[Choice]) -> list[Choice]:
    """Return the choices that a list holds, each once and in the order of `known`.

    Args:
        name: of the field, for the message.
        value: from the request.
        known: choices.

    Raises:
        FormError: not a list, too long a list, or a member that is not a choice.
    """
    if not isinstance(value, (list, tuple)) or len(value) > len(known):
        raise FormError(f"{name}: not a list of choices; use {', '.join(str(choice) for choice in known)}")
    chosen = [one_of(name, member, known) for member in value]
    return [choice for choice in known if choice in chosen]


def text(name: str, value: Any, longest: int) -> str:
    """Return a text of characters that can be shown and written, '' for nothing.

    Args:
        name: of the field, for the message.
        value: from the request.
        longest: characters.

    Raises:
        FormError: not a text, too long a text, control characters, or half of a surrogate pair.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FormError(f"{name}: not a text; write one")
    if len(value) > longest:
        raise FormError(f"the {name} has {len(value)} characters; the page takes up to {longest}")
    if any((ord(letter) < 32 and letter not in "\t\n\r") or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise FormError(f"the {name} has characters that are not text; remove them")
    return value


def files(name: str, value: Any, most: int) -> list[str]:
    """Return the paths of uploaded files, without a check of their folder.

    Args:
        name: of the field, for the message.
        value: from the request.
        most: files.

    Raises:
        FormError: not a list of paths, or too many.
    """
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) for path in listed):
        raise FormError(f"{name}: not a list of uploaded files; upload them again")
    if len(listed) > most:
        raise FormError(f"{name}: {len(listed)} files; the page takes up to {most}")
    return [str(path) for path in listed]


def excerpt(value: Any) -> str:
    """Return the beginning of a value, on one line, fit to repeat in an answer."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a huge number"
    written = repr(value) if isinstance(value, (str, int, float)) or value is None else f"a {type(value).__name__}"
    written = written.encode("ascii", "backslashreplace").decode() if not written.isprintable() else written
    return written if len(written) <= SHOWN else f"{written[:SHOWN]}..."


def without_folders(line: str) -> str:
    """Remove the folders from the absolute paths of a line, so that no visitor sees them."""
    return PATHS.sub("", line)


def line_of(error: Exception) -> str:
    """Return the message of an error as one line without the server's folders."""
    line = without_folders(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= LINE else f"{line[:LINE]}..."


def escape_markup(line: str) -> str:
    """Escape a text for a field that shows Markdown and HTML: it is shown as it was written."""
    return MARKUP.sub(r"\\\1", html.escape(line, quote=False))
