"""Survey of a source: the images that can be used, and their buckets, by file headers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from davae.data.buckets import nearest_bucket
from davae.data.images import ImageSource, by_kind, summarise_skipped, target_name
from davae.data.sizes import ImageSizes, measure_sizes
from davae.errors import DataError

logger = logging.getLogger(__name__)


NAMED = 3  # left-out images of a kind that are named; all are counted
LARGER = "most are too small: use larger images, a smaller resolution, or --set data.enlarge=true"


@dataclass(frozen=True)
class Survey:
    """Images of a source that can be used, by their headers.

    Attributes:
        indices: images that can be used.
        groups: bucket of each of them.
        left_out: name of every other image, and why.
        pixels: (N,2) width and height of the usable ones.
    """

    indices: list[int]
    groups: np.ndarray
    left_out: dict[str, str]
    pixels: np.ndarray


def survey(
    source: ImageSource,
    indices: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    enlarge: bool = False,
    measured: ImageSizes | None = None,
    strict: bool = True,
) -> Survey:
    """Find the images that fill a bucket without being enlarged, and log the others.

    Pixels are not decoded: an image that is damaged behind its header is found when it is read.

    Args:
        sizes: (width, height) of each bucket; none keeps images of every size.
        enlarge: keep images that are smaller than every bucket.
        measured: sizes of the images, where they are known.
        strict: refuse a source without a usable image.

    Raises:
        DataError: when none is left, naming the largest that was found.
    """
    measured = measured or measure_sizes(source, indices)
    kept: list[int] = []  # places
    groups: list[int] = []
    left_out: dict[str, str] = {}
    largest, small = (0, 0), 0
    target = target_name(*sizes[0]) if sizes else ""
    bucket_of = lru_cache(100_000)(lambda width, height: nearest_bucket(sizes, width, height, enlarge))
    for place, (width, height) in enumerate(measured.pixels.tolist()):
        if place in measured.reasons:
            left_out[source.key(indices[place])] = measured.reasons[place]
            continue
        group = bucket_of(width, height) if sizes else 0
        if group is None:
            small, largest = small + 1, max(largest, (width, height), key=min)
            reason = f"too small: {width}x{height} is smaller than the target of {target}"
            left_out[source.key(indices[place])] = reason
            continue
        kept.append(place)
        groups.append(group)
    refused = strict and not kept
    log_left_out(left_out, len(indices), "" if refused or 2 * small <= len(indices) else f"; {LARGER}")
    if strict and left_out and small == len(indices):
        raise DataError(
            f"every image is smaller than the target of {target} (the largest is {largest[0]}x{largest[1]}): davae "
            "never enlarges training data unless data.enlarge is set; use larger images or a smaller base.resolution"
        )
    if strict and left_out and not kept:
        raise DataError(f"none of the {len(indices)} images can be used; {summarise_skipped(left_out)}")
    return Survey([indices[place] for place in kept], np.asarray(groups, np.int16), left_out, measured.pixels[kept])


def log_left_out(left_out: dict[str, str], found: int, remedy: str) -> None:
    """Log a line for each kind of fault, with the reason of its first image, and one for all."""
    for first, *others in by_kind(left_out).values():
        more = f" and {len(others) - NAMED + 1:,} more" if len(others) >= NAMED else ""
        alike = f"; the same of {', '.join(others[: NAMED - 1])}{more}" if others else ""
        logger.warning("left out %s: %s%s", first, left_out[first], alike)
    if left_out:
        used = found - len(left_out)
        logger.warning("%d of %d images can be used; %s%s", used, found, summarise_skipped(left_out), remedy)


def usable(source: ImageSource, indices: Sequence[int], resolution: int, enlarge: bool = False) -> list[int]:
    """Return the images that can be used for squares of `resolution` pixels.

    Args:
        source: the images.
        indices: the candidates.
        resolution: side of the square, pixels.
        enlarge: keep smaller images.
    """
    return survey(source, indices, [(resolution, resolution)], enlarge).indices
