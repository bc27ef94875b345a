"""Image sizes of other aspect ratios at the square's token count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from davae.errors import DataError

Tokens = Literal["exact", "at_most"]
LEAST_SHARE = 0.95  # of the square's tokens, for `at_most`


def bucket_sizes(resolution: int, step: int, max_ratio: float, tokens: Tokens = "exact") -> list[tuple[int, int]]:
    """Return (width, height) in pixels of every bucket, the square first, then by aspect ratio.

    With n = resolution / step tokens a side, a bucket is a x b tokens with max(a, b) / min(a, b) <= `max_ratio`.
    `exact` takes a * b = n^2 alone: every batch costs and weighs the same, and there are as many buckets as n^2 has
    divisors in range. `at_most` takes for each a the largest b with a * b <= n^2 and keeps those with 95 % of n^2 or more.

    Args:
        resolution: side of the square, pixels.
        step: pixels a token spans: autoencoder factor x scale x patch.

    Raises:
        DataError: a resolution that the step does not divide.
    """
    if resolution % step:
        raise DataError(f"data.buckets: {resolution} pixels are not divisible by {step}, the pixels of a token")
    side = resolution // step
    total = side * side
    found = {(side, side)}
    for a in range(1, math.isqrt(total) + 1):
        b = total // a
        enough = a * b == total if tokens == "exact" else a * b >= LEAST_SHARE * total
        if enough and b / a <= max_ratio:
            found |= {(a, b), (b, a)}
    ordered = sorted(found, key=lambda size: (size != (side, side), size[0] / size[1]))
    return [(a * step, b * step) for a, b in ordered]


def nearest_bucket(sizes: Sequence[tuple[int, int]], width: int, height: int, enlarge: bool = False) -> int | None:
    """Return the bucket of the nearest aspect ratio (in the logarithm) that needs no enlarging.

    Args:
        sizes: (width, height) of each bucket.
        width, height: the image's.
        enlarge: take small images too.
    """
    fitting = [n for n, (w, h) in enumerate(sizes) if enlarge or (w <= width and h <= height)]
    if not fitting:
        return None
    ratio = math.log(width / height)
    return min(fitting, key=lambda n: (abs(math.log(sizes[n][0] / sizes[n][1]) - ratio), n))


def group_counts(sizes: Sequence[tuple[int, int]], groups: np.ndarray) -> dict[str, int]:
    """Return the number of images of each bucket, `1024x1024: 12`."""
    return {f"{w}x{h}": int((groups == n).sum()) for n, (w, h) in enumerate(sizes)}
