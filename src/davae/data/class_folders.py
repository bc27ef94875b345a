"""Classes named by folders, and the captions that the names of folders give."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from itertools import takewhile

# Names that only mean that images are inside: `images1024x1024`.
CONTAINERS = re.compile(r"(?:image|img|picture|photo)s?[ _-]?(?:\d+(?:x\d+)?)?|data|jpe?g|png|jpegimages", re.I)
NUMBERED = re.compile(r"\d{4,}")
PREFIXED = re.compile(r"\d{1,4}[ _.-]+(\S.*)")  # `10_sks dog`, ten repeats; `001.Black_footed_Albatross`


def classes_of_folders(read: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the class of each folder, nothing for a single folder or `images/` and the like.

    A class is named by the last part of its path; where two end alike both are named by the whole path. `photo/` is a class
    next to several others (`sketch/`, `cartoon/`).
    """
    near = Counter(parts[:-1] for parts in read.values() if parts and not CONTAINERS.fullmatch(parts[-1]))
    paths = {
        folder: kept
        for folder, parts in read.items()
        if (
            kept := tuple(
                n for n in parts if not CONTAINERS.fullmatch(n) or (n == parts[-1] and near[parts[:-1]] > 1)
            )
        )
    }
    distinct = set(paths.values())
    if len(distinct) < 2:
        return {}
    ends = Counter(path[-1] for path in distinct)
    columns = zip(*(path[:-1] for path in distinct), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, columns))
    return {folder: path[-1] if ends[path[-1]] == 1 else "/".join(path[shared:]) for folder, path in paths.items()}


def caption_of_class(name: str) -> str | None:
    """Return the name of a class as a caption, None for numbered pieces of a set."""
    return None if NUMBERED.fullmatch(name.rpartition("/")[2]) else name.replace("/", " ").replace("_", " ")


def order_note(names: Collection[str]) -> str | None:
    """Return a sentence on numbered classes that text sorts differently, else None."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return None
    ordered = sorted(names)
    odd = next((number for number, name in enumerate(ordered) if int(name) != number), None)
    if odd is None or ordered == sorted(names, key=int):
        return None
    return f"the folders are numbers, and classes follow the order of names as text: folder {ordered[odd]} is class {odd}"


def captions_of_classes(names: Collection[str]) -> tuple[dict[str, str | None], bool]:
    """Return each class's caption, and whether numbers before all the names were removed."""
    found = {name: PREFIXED.fullmatch(name) for name in names}
    numbered = bool(found) and all(found.values())
    return {name: caption_of_class(own[1] if numbered and own else name) for name, own in found.items()}, numbered
