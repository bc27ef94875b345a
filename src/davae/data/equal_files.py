"""Images with equal bytes under two names, found without reading the whole set."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

SAMPLE = 4096  # bytes at the beginning, the middle and the end that are compared before whole files are
CHUNK = 1 << 20


@runtime_checkable
class FileImages(Protocol):
    """A source whose images are files, of which parts can be read."""

    def length(self, index: int) -> int:
        """Return the bytes of an image's file, 0 where there is none."""
        ...

    def parts(self, index: int, stretches: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield parts of an image's file, each by offset and size, or raise OSError."""
        ...


def equal_images(source: FileImages, indices: Sequence[int], without: Collection[int] = ()) -> dict[int, int]:
    """Find images with equal bytes.

    Only files of equal size are opened; 12 kB of each are compared, and the whole files where those are equal.

    Args:
        source: the images.
        indices: those to compare.
        without: places in `indices` to leave out.

    Returns:
        Place of each image that comes a second time -> place of the first one.
    """
    places = [place for place in range(len(indices)) if place not in without]
    groups = _alike(places, lambda place: source.length(indices[place]) or None)
    equal: dict[int, int] = {}
    for digest in (_samples, _whole):
        groups = [
            part for group in groups for part in _alike(group, lambda place, of=digest: of(source, indices[place]))
        ]
    for group in groups:
        equal |= dict.fromkeys(group[1:], group[0])
    return equal


def _alike(places: Iterable[int], key: Callable[[int], Hashable | None]) -> list[list[int]]:
    """Return the groups of two or more places whose keys are equal and not None."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place in places:
        if (found := key(place)) is not None:
            groups[found].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _samples(source: FileImages, index: int) -> bytes | None:
    length = source.length(index)
    starts = sorted({0, max(0, length // 2 - SAMPLE // 2), max(0, length - SAMPLE)})
    return _digest(source, index, [(start, SAMPLE) for start in starts])


def _whole(source: FileImages, index: int) -> bytes | None:
    length = source.length(index)
    if length <= 2 * SAMPLE:  # its samples are all of it
        return b""
    return _digest(source, index, [(start, CHUNK) for start in range(0, length, CHUNK)])


def _digest(source: FileImages, index: int, stretches: Iterable[tuple[int, int]]) -> bytes | None:
    """Return a hash of parts of a file, None where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for data in source.parts(index, stretches):
            digest.update(data)
    except OSError:
        return None
    return digest.digest()
