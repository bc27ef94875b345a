"""Text of others, such as captions and names, as plain text inside Markdown."""

from __future__ import annotations

import html
import re

SPECIAL = re.compile(r"[\\`*\[\]|#~$]|(?<!\w)_|_(?!\w)")


def encodable(text: str) -> str:
    """Return a text without lone surrogates, which no UTF-8 file can hold, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: object) -> str:
    """Return a text with every run of white space, line breaks included, as one space."""
    return " ".join(encodable(str(text)).split())


def as_prose(text: object) -> str:
    """Return a text on one line that Markdown shows as it is, without markup or HTML."""
    return SPECIAL.sub(lambda found: "\\" + found[0], html.escape(one_line(text), quote=False))


def as_code(text: object) -> str:
    """Return a text as a code span, whatever backticks it contains."""
    line = one_line(text).replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fence(*blocks: object) -> str:
    """Return backticks that none of these texts can close a code block with."""
    return "`" * max(3, 1 + max((_longest_run(str(block)) for block in blocks), default=0))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
