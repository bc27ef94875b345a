"""Folders -> classes, and which of `train/`, `val/`, `test/` is read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from davae.data.pictures import DataError

SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|eval|holdout)(?:[_-]?(?:set|split|data|images))?[_-]?\d*",
    re.IGNORECASE,
)
SPLITS = {
    "training": "train",
    **dict.fromkeys(("valid", "validation", "dev", "holdout"), "val"),
    **dict.fromkeys(("testing", "eval"), "test"),
}
CONTAINERS = frozenset(
    ("image", "images", "img", "imgs", "pictures", "photos", "data", "jpg", "jpeg", "png", "jpegimages")
)  # names that only say that images are inside
NUMBERED = re.compile(r"\d{4,}")
PREFIXED = re.compile(r"\d{1,4}[ _.-]+(\S.*)")  # `10_sks dog`, ten repeats; `001.Black_footed_Albatross`


def split_of(name: str) -> str | None:
    """Return `train`, `val` or `test` for a folder that is named so (`training`, `validation`, `train2017`)."""
    found = SPLIT.fullmatch(name)
    return None if found is None else SPLITS.get(found[1].lower(), found[1].lower())


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
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in paths.values():
        for depth, name in enumerate(parts):
            children[parts[:depth]].add(name)
    points = {
        at: {name: split_of(name) for name in names}
        for at, names in children.items()
        if len({split for name in names if (split := split_of(name))}) > 1
    }
    goal = split_of(wanted) or wanted
    for at, names in points.items():
        place = "/".join((where, *at))
        if goal not in names.values():
            raise DataError(
                f"{place} holds {', '.join(f'{n}/' for n in sorted(names))} but no {goal}/; set data.split to the one to read"
            )
        if strange := sorted(name for name, split in names.items() if split is None):
            raise DataError(
                f"{place} holds {goal}/ and other splits, and images in {', '.join(f'{n}/' for n in strange[:3])} next to "
                "them; name the folder to read in data.source"
            )
    if wanted != "train" and not points:
        raise DataError(f"data.split '{wanted}': {where} has no folders named after splits; leave it out")
    chosen = Chosen(split=bool(points))
    for folder, parts in paths.items():
        at_points = [depth for depth in range(len(parts) + 1) if parts[:depth] in points]
        other = next((d for d in at_points if d == len(parts) or points[parts[:d]][parts[d]] != goal), None)
        if other is None:
            chosen.read[folder] = tuple(name for depth, name in enumerate(parts) if depth not in at_points)
        else:
            chosen.left[folder] = "next to the splits" if other == len(parts) else f"in {parts[other]}/"
    return chosen


def class_names(read: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the class of each folder, none where the folders are not classes: a single one, or `images/` and the like.

    A class is named by the last part of its path; where two end alike both are named by the whole path.
    """
    paths = {
        folder: kept
        for folder, parts in read.items()
        if (kept := tuple(name for name in parts if name.lower() not in CONTAINERS))
    }
    distinct = set(paths.values())
    if len(distinct) < 2:
        return {}
    ends = Counter(path[-1] for path in distinct)
    columns = zip(*(path[:-1] for path in distinct), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, columns))
    return {folder: path[-1] if ends[path[-1]] == 1 else "/".join(path[shared:]) for folder, path in paths.items()}


def caption_of_class(name: str) -> str | None:
    """Return a class's name as a caption; None for numbered folders, which only divide a set into pieces."""
    return None if NUMBERED.fullmatch(name.rpartition("/")[2]) else name.replace("/", " ").replace("_", " ")


def captions_of_classes(names: Collection[str]) -> tuple[dict[str, str | None], bool]:
    """Return the caption of each class, without the numbers before all names, and whether there are such."""
    found = {name: PREFIXED.fullmatch(name) for name in names}
    numbered = bool(found) and all(found.values())
    return {name: caption_of_class(own[1] if numbered and own else name) for name, own in found.items()}, numbered
