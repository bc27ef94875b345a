"""Measurements of real images, taken once for all models that are compared with them."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from davae.data.images import ImageDataset
from davae.data.latent_cache.key import hash_images, hash_values
from davae.dataset.look import batches
from davae.evaluate.detail import ImageSet, measure_images
from davae.evaluate.features import Features, make_extractor
from davae.evaluate.spectra import ImageSpectrum
from davae.files.atomic import atomic_file
from davae.recipes.sections import Data

logger = logging.getLogger(__name__)
_measured: dict[str, ImageSet] = {}


def real_images(
    images: ImageDataset,
    data: Data,
    held_in: float,
    features: str,
    weights: Path | None,
    patch_size: int = 0,
    keep: Path | None = None,
    batch_size: int = 16,
) -> ImageSet:
    """Measure a set of real images, once in a process, and once for all with `keep`.

    Args:
        images: the images.
        data: the options that they were opened with.
        held_in: share that a split holds out.
        features: network of the distances, `lite0` or `inception`.
        weights: file of the Inception weights.
        patch_size: side of the crops of the patch distance, pixels.
        keep: folder of the measurements. A set whose images, options or network changed is measured anew.
        batch_size: images at a time.
    """
    network = features if weights is None else [features, hashlib.sha256(weights.read_bytes()).hexdigest()]
    prepared = data.model_dump_json(exclude={"source"}), images.resolution, held_in
    key = hash_values(hash_images(images.source, images.indices), *prepared, network, patch_size)
    if key in _measured:
        return _measured[key]
    file = None if keep is None else keep / f"{key}.npz"
    found = None if file is None else _read(file)
    if found is None:
        found = measure_images(batches(images, size=batch_size), make_extractor(features, weights), patch_size)
        if file is not None:
            _write(file, found)
    _measured[key] = found
    return found


def _write(file: Path, found: ImageSet) -> None:
    arrays: dict[str, Any] = {"frequency": found.spectrum.frequency, "power": found.spectrum.power}
    for name, part in (("whole", found.whole), ("patches", found.patches)):
        if part is not None:
            arrays[name] = part.features.numpy()
            if part.logits is not None:
                arrays[f"{name}_logits"] = part.logits.numpy()
    with atomic_file(file) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def _read(file: Path) -> ImageSet | None:
    """Return the measurements of a file, None where there is none that can be read."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
        patches = _features(stored, "patches") if "patches" in stored else None
        spectrum = ImageSpectrum(stored["frequency"], stored["power"])
        return ImageSet(_features(stored, "whole"), patches, spectrum)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s): the real images are measured again", file, error)
        return None


def _features(stored: dict[str, np.ndarray], name: str) -> Features:
    logits = stored.get(f"{name}_logits")
    return Features(torch.from_numpy(stored[name]), None if logits is None else torch.from_numpy(logits))
