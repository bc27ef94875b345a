"""Findings of a source: its layout, unused files, duplicates and repaired captions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMED = 10
NOT_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # lone surrogates that do not come from a file name


def printable(name: str) -> str:
    """Return a file name that can be printed, with bytes outside UTF-8 as `\\xff`."""
    return os.fsencode(NOT_BYTES.sub("\ufffd", name)).decode("utf-8", "backslashreplace")


@dataclass
class Tally:
    """A count and the first names, so that memory does not grow with the count.

    Attributes:
        count: how often `add` was called.
        names: the first ten names.
    """

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more and keep its name while there are fewer than ten."""
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(name)


def add_to(tallies: dict[str, Tally], kind: str, name: str) -> None:
    """Count `name` under `kind`."""
    tallies.setdefault(kind, Tally()).add(printable(name))


@dataclass(frozen=True)
class Findings:
    """Facts that a source collects while it is opened and read, for its summary.

    Attributes:
        layout: what was recognised, `folder`, `class folders`, `folder with metadata.jsonl`, `shards`, `table`, ...
        captions_from: where captions come from, `.txt`, `.json, key caption`, `names of the folders`, `none`, ...
        unused: kind -> files that are neither images nor captions, hidden files, broken links, held-out folders.
        duplicates: kind -> members, shards or rows that exist twice and how that was resolved.
        encodings: file -> how its text was decoded or cleaned, where that is not plain UTF-8. Grows as captions are read.
        cut: file -> characters of a caption that is longer than the limit. Grows as captions are read.
        joined: list or metadata file -> captions that contain its delimiter without quotes.
        class_names: name of class 0, 1, ...; empty where the source has numbers alone.
        notes: decisions that the user should know, one sentence each.
    """

    layout: str
    captions_from: str = "none"
    unused: Mapping[str, Tally] = field(default_factory=dict)
    duplicates: Mapping[str, Tally] = field(default_factory=dict)
    encodings: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
