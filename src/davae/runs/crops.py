"""Crops of two images at the place of their largest difference."""

from __future__ import annotations

import numpy as np
from PIL import Image


def most_different(first: Image.Image, second: Image.Image, side: int) -> tuple[int, int]:
    """Return (left, top) of the square in which two equally large images differ most."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = (difference**2).sum(-1)  # (H,W)
    total = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums of all rectangles from the corner
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(left), int(top)


def squared_error(first: Image.Image, second: Image.Image, box: tuple[int, int, int, int]) -> float:
    """Return the mean squared error of two images, 0 to 255, in (left, top, right, bottom)."""
    difference = np.asarray(first.crop(box), dtype=np.float64) - np.asarray(second.crop(box), dtype=np.float64)
    return float((difference**2).mean())


def magnify_crop(image: Image.Image, left: int, top: int, side: int, times: int) -> Image.Image:
    """Return a square of an image, each pixel a block of `times` x `times`."""
    crop = image.crop((left, top, left + side, top + side))
    return crop.resize((side * times, side * times), Image.Resampling.NEAREST)
