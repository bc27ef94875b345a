"""Folders parallel to those of images: captions (`captions/1.txt`), and masks to leave out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from davae.data.captions.file_names import IMAGE_PARTS, JOINED, Kind, Matched, folded, stem
from davae.data.class_folders import CONTAINERS
from davae.data.splits import split_of

CAPTIONS = re.compile(
    r"(?:(.*)[ _-])?(captions?|labels?|txts?|texts?|prompts?|jsons?|annotations?|descriptions?|tags|cls)(?:[ _-](.*))?",
    re.IGNORECASE,
)
THINGS = re.compile("masks?|alphas?", re.IGNORECASE)  # words for parts that are classes, too
Owner = tuple[str, str]  # folder and name of an image


def assign_parallel(matched: Mapping[str, Matched]) -> tuple[dict[Owner, dict[Kind, str]], dict[str, set[str]]]:
    """Give captions without an image next to them to the images of a parallel folder.

    A caption goes to the one image of its name in the folders that lie where its own does; an image that has a caption next
    to it keeps that.

    Args:
        matched: relative path of a folder, '' the root -> its files.

    Returns:
        Image -> kind -> path of the file; and the names that are used, by folder.
    """
    found: dict[Owner, dict[Kind, str]] = defaultdict(dict)
    used: dict[str, set[str]] = defaultdict(set)
    loose = [
        folder for folder, part in matched.items() if part.loose and any(map(CAPTIONS.fullmatch, _parts(folder)))
    ]
    if not loose:
        return found, used
    near = _near_folders(folder for folder, part in matched.items() if part.images)
    for folder in loose:
        parts = _parts(folder)
        at = next(place for place, name in enumerate(parts) if CAPTIONS.fullmatch(name))
        folders = list(dict.fromkeys(near.get((parts[:at], parts[at + 1 :]), ())))
        exact, alike = _by_stem(folders, matched)
        for name, own, kind in matched[folder].loose:
            owners = _of_one_folder(exact.get(own) or alike.get(folded(own)) or [], at, parts[at])
            for owner in owners:
                if kind in matched[owner[0]].sidecars.get(owner[1], {}) or kind in found[owner]:
                    continue
                found[owner][kind] = f"{folder}/{name}"
                used[folder].add(name)
    return found, used


def _by_stem(
    folders: list[str], matched: Mapping[str, Matched]
) -> tuple[dict[str, list[Owner]], dict[str, list[Owner]]]:
    """Return the images of some folders by stem and by name, and without regard to case."""
    exact: dict[str, list[Owner]] = defaultdict(list)
    alike: dict[str, list[Owner]] = defaultdict(list)
    for folder in folders:
        for name in matched[folder].images:
            exact[stem(name)].append((folder, name))
            exact[name].append((folder, name))
            alike[folded(stem(name))].append((folder, name))
    return exact, alike


def _of_one_folder(owners: list[Owner], at: int, captions: str) -> list[Owner]:
    """Return the owners in one folder, the one that the captions' folder is named after."""
    folders = {folder for folder, _ in owners}
    if len(folders) > 1:
        found = CAPTIONS.fullmatch(captions)
        words = {word.casefold() for word in (found[1], found[3]) if word} if found else set()
        folders = {
            folder for folder in folders if _parts(folder)[at : at + 1] and _parts(folder)[at].casefold() in words
        }
    return [owner for owner in owners if owner[0] in folders] if len(folders) == 1 else []


def _near_folders(folders: Iterable[str]) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]]:
    """Return the folders of images by the parts of a path before and behind one that differs."""
    near: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for folder in folders:
        parts = _parts(folder)
        for at in range(len(parts) + 1):
            near[parts[:at], parts[at:]].append(folder)  # `1.png`, `captions/1.txt`
            near[parts[:at], parts[at + 1 :]].append(folder)  # `images/1.png`, `captions/1.txt`
    return near


def _parts(folder: str) -> tuple[str, ...]:
    return tuple(folder.split("/")) if folder else ()


def part_folders(images: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the folders of masks and the like, whose names are mostly those of images nearby.

    Args:
        images: relative path of a folder, '' the root -> names of its images.
    """
    paths = {folder: _parts(folder) for folder in images}
    place = {
        folder: next((at for at, name in enumerate(parts) if JOINED.fullmatch(name)), None)
        for folder, parts in paths.items()
    }
    if all(at is None for at in place.values()):
        return []
    near = _near_folders(folder for folder in paths if place[folder] is None)
    found = []
    for folder, at in place.items():
        if at is None:
            continue
        own = {stem(name) for name in images[folder]}
        own = {joined[1] if (joined := JOINED.fullmatch(name)) and joined[1] else name for name in own}
        others = near.get((paths[folder][:at], paths[folder][at + 1 :])) or near.get((paths[folder][:at], ()), ())
        known = Counter(one for other in dict.fromkeys(others) for one in {stem(name) for name in images[other]})
        if own and 2 * len(own & known.keys()) >= len(own):
            # `mask/1.png` next to `hat/1.png` and `glasses/1.png` is a mask of neither, so `mask/` is a class like them
            several = sum(known[name] > 1 for name in own)
            alike = all(_may_be_class(_parts(other), at, len(paths[folder])) for other in others)
            if not (alike and THINGS.fullmatch(paths[folder][at]) and 2 * several >= len(own & known.keys())):
                found.append(folder)
    return found


def _may_be_class(parts: tuple[str, ...], at: int, depth: int) -> bool:
    """Return whether the part of a path next to `masks/` is neither an image folder nor a split."""
    name = parts[at] if len(parts) == depth else "images"
    return name.casefold() not in IMAGE_PARTS and not CONTAINERS.fullmatch(name) and split_of(name) is None
