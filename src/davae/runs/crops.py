"""Where two pictures differ most, and that place enlarged."""

from __future__ import annotations

import numpy as np
from PIL import Image


def most_different(first: Image.Image, second: Image.Image, side: int) -> tuple[int, int]:
    """(left, top) of the square of `side` pixels in which two equally large pictures differ most, by squared error."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = (difference**2).sum(-1)  # (H,W)
    total = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums of all rectangles from the corner
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(left), int(top)


def squared_error(first: Image.Image, second: Image.Image, box: tuple[int, int, int, int]) -> float:
    """Mean squared error of two pictures inside (left, top, right, bottom), for values of 0 to 255."""
    difference = np.asarray(first.crop(box), dtype=np.float64) - np.asarray(second.crop(box), dtype=np.float64)
    return float((difference**2).mean())


def enlarged(picture: Image.Image, left: int, top: int, side: int, times: int) -> Image.Image:
    """A square of a picture, each pixel a block of `times` x `times`."""
    crop = picture.crop((left, top, left + side, top + side))
    return crop.resize((side * times, side * times), Image.Resampling.NEAREST)
