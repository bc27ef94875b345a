"""Patterns of shard names: braces, `*` and folders."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from davae.data.captions.file_names import is_hidden
from davae.data.shards.commands import PIPE
from davae.data.shards.tar_index import ENDINGS
from davae.errors import DataError

MAX_SHARDS = 1_000_000
INNERMOST = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_shard(name: str) -> bool:
    """Return whether a name ends as a tar file's, plain or compressed."""
    return name.lower().endswith(ENDINGS)


def expand_braces(pattern: str) -> list[str]:
    """Return the names of a pattern in order: 'a-{000..003}.tar', '{train,extra}.tar', nested.

    Args:
        pattern: names; in a command behind `pipe:` only ranges are expanded, its other braces are the program's.

    Raises:
        DataError: more than a million names.
    """
    names = list(islice(_expanded(pattern, commas=not pattern.startswith(PIPE)), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise DataError(f"data.source: {pattern[:200]} names more than {MAX_SHARDS:,} shards; use a smaller range")
    return list(dict.fromkeys(names))


def _expanded(pattern: str, commas: bool) -> Iterator[str]:
    """Yield names lazily, so that an absurd range costs nothing."""
    for found in INNERMOST.finditer(pattern):
        inside = found[1]
        if (ends := RANGE.fullmatch(inside)) is not None:
            first, last = int(ends[1]), int(ends[2])
            width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
            numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            parts: Iterator[str] = (str(number).zfill(width) for number in numbers)
        elif commas and "," in inside:
            parts = iter(inside.split(","))
        else:
            continue
        for part in parts:
            yield from _expanded(pattern[: found.start()] + part + pattern[found.end() :], commas)
        return
    yield pattern


def literal_folder(name: str) -> str:
    """Return the longest beginning of a pattern that is an existing folder, with its slash."""
    ends = (found.end() for found in reversed(list(re.finditer("/", name))))
    return next((name[:end] for end in ends if os.path.isdir(name[:end])), "")


def matching(name: str) -> list[Path]:
    """Return the file of this very name, else those of the pattern, in order, none hidden."""
    if os.path.isfile(name):
        return [Path(name)]
    folder = literal_folder(name)
    found = sorted(glob.glob(glob.escape(folder) + name[len(folder) :], recursive=True))
    return [Path(path) for path in found if not is_hidden(Path(path).name)]


def expand_shards(pattern: str) -> list[Path]:
    """Return the existing files of 'a-{000..003}.tar' and '*.tar', in order, none hidden.

    Raises:
        DataError: a name without a file.
    """
    paths: list[Path] = []
    folder = pattern if os.path.isfile(pattern) else literal_folder(pattern)
    for name in expand_braces(pattern[len(folder) :]):
        if not (found := matching(folder + name)):
            raise DataError(f"data.source: no shard matches {folder}{name}")
        paths += found
    return paths


def shards_in(folder: Path) -> list[Path]:
    """Return the shards that lie directly in a folder, in order."""
    return sorted(
        path for path in folder.iterdir() if is_shard(path.name) and not is_hidden(path.name) and not path.is_dir()
    )
