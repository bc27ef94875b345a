"""Folders -> classes, and which of `train/`, `val/`, `test/` is read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

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
CONTAINERS = re.compile(
    r"(?:image|img|picture|photo)s?[ _-]?(?:\d+(?:x\d+)?)?|data|jpe?g|png|jpegimages", re.IGNORECASE
)  # names that only say that images are inside: `images1024x1024`
NUMBERED = re.compile(r"\d{4,}")
PREFIXED = re.compile(r"\d{1,4}[ _.-]+(\S.*)")  # `10_sks dog`, ten repeats; `001.Black_footed_Albatross`


def split_of(name: str) -> str | None:
    """Return `train`, `val` or `test` for a folder that is named so (`training`, `validation`, `train2017`)."""
    found = SPLIT.fullmatch(name)
    return None if found is None else SPLITS.get(found[1].lower(), found[1].lower())


def split_points(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], dict[str, tuple[str | None, str]]]:
    """Return the folders that hold splits -> name of each folder in it -> its split, and what else the name contains.

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


def class_names(read: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the class of each folder, none where the folders are not classes: a single one, or `images/` and the like.

    A class is named by the last part of its path; where two end alike both are named by the whole path.
    """
    paths = {
        folder: kept
        for folder, parts in read.items()
        if (kept := tuple(name for name in parts if not CONTAINERS.fullmatch(name)))
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


def order_note(names: Collection[str]) -> str | None:
    """Return a sentence on classes named by numbers whose order, as text, is another; None for all others."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return None
    ordered = sorted(names)
    odd = next((number for number, name in enumerate(ordered) if int(name) != number), None)
    if odd is None or ordered == sorted(names, key=int):
        return None
    return f"the folders are numbers, and classes follow the order of names as text: folder {ordered[odd]} is class {odd}"


def captions_of_classes(names: Collection[str]) -> tuple[dict[str, str | None], bool]:
    """Return the caption of each class, without the numbers before all names, and whether there are such."""
    found = {name: PREFIXED.fullmatch(name) for name in names}
    numbered = bool(found) and all(found.values())
    return {name: caption_of_class(own[1] if numbered and own else name) for name, own in found.items()}, numbered
