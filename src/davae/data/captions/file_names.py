"""Images, sidecars and other files of one folder, by their names, in folders and shards."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from davae.data.findings import Tally, add_to
from davae.data.formats import is_image_name, unused_kind

Kind = Literal["txt", "json", "cls"]
# ending -> kind and rank: of several captions of an image the lowest rank is read
SIDECARS: dict[str, tuple[Kind, int]] = {
    "txt": ("txt", 0),
    "caption": ("txt", 1),
    "caption.txt": ("txt", 2),
    "text": ("txt", 3),
    "text.txt": ("txt", 4),
    "prompt": ("txt", 5),
    "prompt.txt": ("txt", 6),
    "json": ("json", 0),
    "cls": ("cls", 0),
    "cls.txt": ("cls", 1),
}
IMAGE_PARTS = frozenset(("image", "img", "input", "photo", "picture", "rgb", "original"))
OTHER_PARTS = frozenset(
    ("seg", "segmentation", "mask", "masks", "depth", "normal", "normals", "edge", "edges", "canny", "pose", "alpha", "matte",
     "label", "labels", "labelids", "flow", "disparity", "thumb", "thumbnail", "preview")
)  # fmt: skip
JOINED = re.compile(
    r"(?:(.*)[_-])?(masks?|masklabels?|seg|segmentations?(?:class|object)?(?:aug)?|depths?|canny|mattes?|alphas?|labels?"
    r"|labelids|gt|semantic|instances?|trimaps?|condlabels?|parsing|openpose|lr|lq|low[_-]?res|thumbs?|thumbnails?(?:\d+(?:x\d+)?)?"
    r"|annotations|conditioning(?:_images)?)",
    re.IGNORECASE,
)  # `a_mask.png` next to `a.jpg`; folders `masks/`, `train_masks/` next to the images'
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
JUNK = frozenset(
    ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
     "__pycache__", "thumbs", "thumbnails", "_thumbs", "_thumbnails")
)  # fmt: skip


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or litter such as thumbnails."""
    return name.startswith(".") or name.lower() in JUNK


def folded(name: str) -> str:
    """Return a name in which case and the way that accents are composed make no difference."""
    return unicodedata.normalize("NFC", name).casefold()


@dataclass
class Matched:
    """Files of one folder.

    Attributes:
        images: names of images, in the order of the input.
        sidecars: image -> kind -> name of the file.
        metadata: files of the imagefolder convention.
        twice: pairs of images with one stem (`1.png`, `1.jpg`).
        loose: (name, stem, kind) of captions and classes without an image here.
        others: names of files that are neither images nor sidecars.
    """

    images: list[str]
    sidecars: dict[str, dict[Kind, str]] = field(default_factory=lambda: defaultdict(dict))
    metadata: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)
    loose: list[tuple[str, str, Kind]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def count_rest(self, prefix: str, unused: dict[str, Tally], used: Collection[str] = ()) -> None:
        """Count the files that belong to no image of this folder, without the names in `used`."""
        for name in self.others:
            if name not in used:
                add_to(unused, unused_kind(name), prefix + name)
        for name, _, kind in self.loose:
            if name not in used:
                word = {"txt": "caption", "json": ".json", "cls": ".cls"}[kind]
                add_to(unused, f"{word} without an image", prefix + name)


def match(names: Iterable[str], prefix: str, unused: dict[str, Tally], *, shard: bool = False) -> Matched:
    """Sort the file names of one folder.

    Args:
        names: file names without folder.
        prefix: the folder with a trailing `/`, or '', for the names in `unused`.
        unused: counts, by kind, of parts and second captions of an image; added to. `count_rest` adds the others.
        shard: WebDataset's rules: up to the first dot a name is the sample's key, so a further image of a key is a part.
    """
    images: list[str] = []
    others: list[str] = []
    for name in names:
        (images if is_image_name(name) else others).append(name)
    images = _without_parts(images, prefix, unused, shard)
    found = Matched(images)
    by_stem: dict[str, str] = {}
    for name in images:
        if (first := by_stem.setdefault(stem(name), name)) != name:
            found.twice.append((first, name))
    taken: dict[tuple[str, Kind], int] = {}
    loose: list[tuple[str, str, Kind, int]] = []
    keys = _unique(images, lambda name: name.partition(".")[0])
    several: dict[str, list[str]] = {}
    for name in images:
        several.setdefault(stem(name), []).append(name)
    full = frozenset(images)
    for name in others:
        if not shard and name.lower() in METADATA:
            found.metadata.append(name)
            continue
        forms = _sidecar_forms(name)
        if not forms:
            found.others.append(name)
            continue
        for own, kind, rank in forms:
            owners = several.get(own) or ([own] if own in full else None)
            if owners:
                _assign(found, taken, owners, kind, rank, name, prefix, unused)
                break
        else:
            loose.append((name, *forms[0]))
    plain = ("", *IMAGE_PARTS)  # of `Dr. Smith.jpg` a text is `Dr.txt`, but not `Dr. Jones.txt`
    sure = {key: name for key, name in keys.items() if shard or stem(name)[len(key) + 1 :].lower() in plain}
    _assign_loose(found, taken, loose, keys, sure, prefix, unused)
    return found


def stem(name: str) -> str:
    return name.rpartition(".")[0]


def _sidecar_forms(name: str) -> list[tuple[str, Kind, int]]:
    """Return (stem, kind, rank) of each reading: `1.caption.txt` belongs to `1` or `1.caption`."""
    own, dot, ending = name.rpartition(".")
    first = SIDECARS.get(ending.lower()) if dot else None
    forms: list[tuple[str, Kind, int]] = [(own, *first)] if first else []
    before, dot, middle = own.rpartition(".")
    if dot and (second := SIDECARS.get(f"{middle}.{ending}".lower())):
        forms.append((before, *second))
    return forms


def _assign(
    found: Matched,
    taken: dict[tuple[str, Kind], int],
    owners: list[str],
    kind: Kind,
    rank: int,
    name: str,
    prefix: str,
    unused: dict[str, Tally],
) -> None:
    """Give a sidecar to its images, of which each keeps the lowest rank, then lower case."""
    rank = 2 * rank + (not name.rpartition(".")[2].islower())
    for owner in owners:
        before = taken.get((owner, kind))
        if before is not None:
            loser = name if rank >= before else found.sidecars[owner][kind]
            add_to(unused, f"second {'caption' if kind == 'txt' else '.' + kind} of an image", prefix + loser)
            if rank >= before:
                continue
        taken[owner, kind] = rank
        found.sidecars[owner][kind] = name


def _assign_loose(
    found: Matched,
    taken: dict[tuple[str, Kind], int],
    loose: list[tuple[str, str, Kind, int]],
    keys: dict[str, str],
    sure: dict[str, str],
    prefix: str,
    unused: dict[str, Tally],
) -> None:
    """Match other sidecars by WebDataset's key, then without regard to case and accents."""
    if not loose:
        return
    by_fold = _unique(found.images, lambda name: folded(stem(name)))
    for name, own, kind, rank in loose:
        key = name.partition(".")[0]
        bare = any(own == key for own, *_ in _sidecar_forms(name))
        owner = (keys if bare else sure).get(key) or by_fold.get(folded(own)) or by_fold.get(folded(key))
        if owner is None:
            found.loose.append((name, own, kind))
        else:
            _assign(found, taken, [owner], kind, rank + len(SIDECARS), name, prefix, unused)


def _unique(names: list[str], key) -> dict[str, str]:
    """Return the names whose key no other name has, by key."""
    found: dict[str, str] = {}
    several: set[str] = set()
    for name in names:
        value = key(name)
        if value in found:
            several.add(value)
        found[value] = name
    return {value: name for value, name in found.items() if value not in several}


def _without_parts(images: list[str], prefix: str, unused: dict[str, Tally], shard: bool) -> list[str]:
    """Leave out images that are a part of another sample: masks, depth maps, segmentations.

    In a shard every further image of a key is a part once one is known to be the image: `000.jpg` or `000.image.png`. In a
    folder, where dots in names mean nothing, only parts with a known word are.
    """
    stems = {stem(name) for name in images}
    joined = {name for name in images if (own := JOINED.fullmatch(stem(name))) and own[1] in stems}
    for name in sorted(joined):
        add_to(unused, "other part of a sample", prefix + name)
    images = [name for name in images if name not in joined]
    if not any("." in own for own in stems):
        return images
    groups: dict[str, list[str]] = defaultdict(list)
    for name in images:
        groups[name.partition(".")[0]].append(name)
    parts: set[str] = set()
    for key, group in groups.items():
        words = {name: stem(name)[len(key) + 1 :].lower() for name in group}
        mains = [name for name in group if words[name] == ""] or [
            name for name in group if words[name] in IMAGE_PARTS
        ]
        if len(group) > 1 and mains:
            parts |= {name for name in group if name not in mains and (shard or words[name] in OTHER_PARTS)}
    for name in images:
        if name in parts:
            add_to(unused, "other part of a sample", prefix + name)
    return [name for name in images if name not in parts]
