"""Splits: which of `train/`, `val/`, `test/` is read, of folders, files and tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.data.findings import Tally, add_to
from davae.errors import DataError

SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|eval|holdout)(?:[_-]?(?:set|split|data|images))?[_-]?\d*",
    re.IGNORECASE,
)
SPLITS = {
    "training": "train",
    **dict.fromkeys(("valid", "validation", "dev", "holdout"), "val"),
    **dict.fromkeys(("testing", "eval"), "test"),
}
SPLIT_WORD = re.compile(
    r"(?<![A-Za-z])(?i:(train|training|val|valid|validation|test|testing))(?![a-z])"
)  # `DIV2K_train_HR`
JOINT = re.compile(r"([ _.-])\0[ _.-]")  # where a split's word was


def split_of(name: str) -> str | None:
    """Return the split, `train`, `val` or `test`, of a name such as `training` or `train2017`."""
    found = SPLIT.fullmatch(name)
    return None if found is None else SPLITS.get(found[1].lower(), found[1].lower())


def split_points(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], dict[str, tuple[str | None, str]]]:
    """Return folder with splits -> name of a folder in it -> its split, rest of the name.

    Names are splits as a whole (`train`, `val2017`), or by a word in which they alone differ (`cat_train`, `cat_test`).
    """
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in paths:
        for depth, name in enumerate(parts):
            children[parts[:depth]].add(name)
    points = {}
    for at, names in children.items():
        found: dict[str, tuple[str | None, str]] = {}
        splits: dict[str, set[str]] = defaultdict(set)
        for name in sorted(names):
            own, rest = split_of(name), ""
            if own is None and (word := SPLIT_WORD.search(name)) is not None:
                own, rest = split_of(word[1]), f"{name[: word.start()]}\0{name[word.end() :]}"
            found[name] = own, JOINT.sub(r"\1", rest).replace("\0", "").strip(" _-.")
            if own is not None:
                splits[rest].add(own)
        if any(len(of_name) > 1 for of_name in splits.values()):
            points[at] = found
    return points


def split_note(wanted: str) -> str:
    """Return a sentence on the split that is read."""
    return f"only the split '{wanted}' is read; data.split names another"


@dataclass
class Chosen:
    """Folders that are read.

    Attributes:
        read: folder -> its path without the split's name, as a tuple of names.
        left: folders of the other splits -> the split.
        split: whether there were splits.
    """

    read: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    split: bool = False


def choose_split(folders: Iterable[str], wanted: str, where: str) -> Chosen:
    """Keep one split where folders of several splits lie next to each other, at any depth.

    Args:
        folders: relative paths of the folders with images, '' the root.
        wanted: the split to read, `train` by default.
        where: the source, for messages.

    Raises:
        DataError: the wanted split is missing, or other folders with images lie next to the splits.
    """
    paths = {folder: tuple(folder.split("/")) if folder else () for folder in folders}
    points = split_points(paths.values())
    goal = split_of(wanted) or wanted
    for at, names in points.items():
        place = "/".join((where, *at))
        if goal not in {split for split, _ in names.values()}:
            raise DataError(
                f"{place} holds {', '.join(f'{n}/' for n in sorted(names))} but no {goal}/; set data.split to the one to read"
            )
        if strange := sorted(name for name, (split, _) in names.items() if split is None):
            raise DataError(
                f"{place} holds {goal}/ and other splits, and images in {', '.join(f'{n}/' for n in strange[:3])} next to "
                "them; name the folder to read in data.source"
            )
    if wanted != "train" and not points:
        raise DataError(f"data.split '{wanted}': {where} has no folders named after splits; leave it out")
    chosen = Chosen(split=bool(points))
    for folder, parts in paths.items():
        at_points = [depth for depth in range(len(parts) + 1) if parts[:depth] in points]
        other = next((d for d in at_points if d == len(parts) or points[parts[:d]][parts[d]][0] != goal), None)
        if other is None:
            kept = (points[parts[:d]][name][1] if d in at_points else name for d, name in enumerate(parts))
            chosen.read[folder] = tuple(name for name in kept if name)
        else:
            chosen.left[folder] = "next to the splits" if other == len(parts) else f"in {parts[other]}/"
    return chosen


SPLIT_PARTS = re.compile(r"[-_./]")


def files_of_split(files: Sequence[Path], wanted: str, folder: Path, unused: dict[str, Tally]) -> list[Path]:
    """Keep one split of files that are named after several, as `train-00000-of-00002.parquet`.

    Args:
        files: shards or tables of a folder.
        wanted: the split, `train` by default.
        folder: for messages.
        unused: counts the files of other splits; added to.

    Raises:
        DataError: the split is missing, or files of no split lie next to the others.
    """
    shown = {path: path.relative_to(folder).as_posix() for path in files}
    split = {path: next(filter(None, map(split_of, SPLIT_PARTS.split(shown[path])[:-1])), None) for path in files}
    names = {name for name in split.values() if name}
    goal = split_of(wanted) or wanted
    if len(names) < 2 and not (names and goal != "train"):
        if goal != "train":
            raise DataError(f"data.split '{wanted}': {folder} has no files named after splits; leave it out")
        return list(files)
    if goal not in names:
        raise DataError(
            f"folder {folder} holds files of {', '.join(sorted(names))} but none of {goal}; set data.split to the one to read"
        )
    if strange := next((shown[path] for path, name in split.items() if name is None), None):
        raise DataError(
            f"folder {folder} holds files of several splits, and {strange}; name the files in data.source"
        )
    for path, name in split.items():
        if name != goal:
            add_to(unused, f"file of the split {name}", shown[path])
    return [path for path, name in split.items() if name == goal]


def refuse_split(wanted: str, where: str, name: object) -> None:
    """Refuse a split of a source without splits, unless its name is that of the split."""
    goal = split_of(wanted) or wanted
    if goal not in ("train", *map(split_of, SPLIT_PARTS.split(str(name)))):
        raise DataError(f"data.split '{wanted}': {where} is not divided into splits; leave it out")


def table_of_split(rows: Mapping[str, Any], wanted: str, name: str) -> Any:
    """Return one of several tables.

    Raises:
        DataError: the split is missing.
    """
    if wanted not in rows:
        raise DataError(
            f"data.source: {name} holds {', '.join(rows)} but no {wanted}; set data.split to the one to read"
        )
    return rows[wanted]
