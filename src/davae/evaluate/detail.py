"""Measures of fine detail: a distance between crops, and the power spectra of images.

A global Frechet distance resizes every image to its network's input, and with it most of what an upgrade adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from davae.evaluate.distribution import Gaussian, distribution_scores, frechet_distance
from davae.evaluate.features import Extractor, Features, join_features
from davae.evaluate.spectra import ImageSpectrum, SpectrumMeter, top_octave_error

PATCH_SIZE = 64  # pixels of a crop by default
PATCHES_PER_IMAGE = 4


def patch_places(height: int, width: int, size: int, number: int) -> list[tuple[int, int]]:
    """Return (top, left) of the crops of one image, at most four cells of a centred grid.

    Patch FID as Chai et al. define it (Any-resolution Training, ECCV 2022) takes random places and scales. Here the scale is
    the final resolution's, and where an image has at most four cells all of them count, so that two sets are cropped alike.

    Args:
        height, width: of the image, pixels.
        size: side of a crop, pixels.
        number: the image's place in its set; it seeds the choice where there are more than four cells.
    """
    rows, columns = height // size, width // size
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    cells = np.arange(rows * columns)
    if len(cells) > PATCHES_PER_IMAGE:
        cells = np.sort(np.random.default_rng(number).choice(cells, PATCHES_PER_IMAGE, replace=False))
    return [(top + int(cell) // columns * size, left + int(cell) % columns * size) for cell in cells]


def image_patches(images: Tensor, size: int, first: int = 0) -> Tensor:
    """Return the crops of a batch, image after image.

    Args:
        images: (B,3,H,W); H and W at least `size`.
        size: side of a crop, pixels.
        first: place of the batch's first image in its set.

    Returns:
        (B*k,3,size,size), k of `patch_places`.
    """
    height, width = images.shape[-2:]
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for number, image in enumerate(images, first)
            for top, left in patch_places(height, width, size, number)
        ]
    )


@dataclass(frozen=True)
class ImageSet:
    """Measurements of a set of images.

    Attributes:
        whole: features of the images.
        patches: features of their crops; None where the images have no crop of that size, or none was asked for.
        spectrum: mean power spectrum.
    """

    whole: Features
    patches: Features | None
    spectrum: ImageSpectrum


def measure_images(batches: Iterable[Tensor], extractor: Extractor, patch_size: int = 0) -> ImageSet:
    """Return features and spectrum of all images, read once.

    Args:
        batches: (B,3,H,W) in [-1,1], one size.
        extractor: the network.
        patch_size: side of the crops; 0 takes none. An image that is not larger than a crop has none of its own.

    Raises:
        ValueError: no images, or features that are not finite.
    """
    meter, parts, crops, count = SpectrumMeter(), [], [], 0
    for images in batches:
        meter.add(images)
        parts.append(extractor(images))
        if 0 < patch_size < max(images.shape[-2:]) and patch_size <= min(images.shape[-2:]):
            crops += [extractor(part) for part in image_patches(images, patch_size, count).split(max(len(images), 1))]
        count += len(images)
    return ImageSet(join_features(parts), join_features(crops) if crops else None, meter.result())


def detail_scores(generated: ImageSet, real: ImageSet, frechet_name: str, patch_size: int) -> dict[str, float]:
    """Return the figures of fine detail under plain keys.

    `patch_fd_lite0` (or `patch_fid`) with `patch_size` and the number of crops a side, where both sets have crops;
    `spectrum_top_octave_rms_db` and `spectrum_top_octave_db` of `top_octave_error`.

    Args:
        generated, real: the sets, at one size.
        frechet_name: `fid` or `fd_lite0`.
        patch_size: side of the crops, pixels.

    Raises:
        DataError: images of different sizes.
    """
    rms, mean = top_octave_error(generated.spectrum, real.spectrum)
    figures: dict[str, float] = {"spectrum_top_octave_rms_db": rms, "spectrum_top_octave_db": mean}
    if generated.patches is not None and real.patches is not None:
        figures[f"patch_{frechet_name}"] = frechet_distance(generated.patches.features, real.patches.features)
        figures |= {"patch_size": patch_size, "patches": len(generated.patches), "patches_real": len(real.patches)}
    return figures


def compare_sets(
    generated: ImageSet, real: ImageSet, frechet_name: str, patch_size: int, stored: Gaussian | None = None
) -> dict[str, float]:
    """Return every distance between two sets of images under plain keys.

    Args:
        generated, real: the sets, at one size.
        frechet_name: of a Frechet distance on these features, `fid` or `fd_lite0`.
        patch_size: side of the crops, pixels.
        stored: what the global Frechet distance is taken to, in place of the real images' own features.

    Raises:
        DataError: too few images on a side, or sets of different sizes.
    """
    figures = distribution_scores(generated.whole, real.whole, stored=stored).as_dict(frechet_name)
    return figures | detail_scores(generated, real, frechet_name, patch_size)
