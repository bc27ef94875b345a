"""Latents and text embeddings that are not finite: left out by name, and too many of them an error."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from davae.data.pictures import DataError, counted

LATENT, EMBEDDING = "latent not finite", "caption embedding not finite"
ALLOWED = 0.1  # share of the images; above it the model is at fault, not the images
ALWAYS = 2  # images that are no reason to stop, however few there are


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, list[str | None]]:
    """Return values (N,...) as they are kept, and for each row what is wrong with it, None where nothing is.

    Args:
        values: float32.
        dtype: numpy's name of the dtype to keep; a value beyond its range would be kept as infinity.
    """
    with np.errstate(over="ignore"):
        kept = values.astype(dtype)
    found = np.isfinite(kept).reshape(len(kept), -1).all(1)
    faults: list[str | None] = [None] * len(kept)
    for row in np.flatnonzero(~found):
        beyond = np.isfinite(values[row]).all()
        faults[row] = f"values beyond {dtype}, up to {np.abs(values[row]).max():.3g}" if beyond else "NaN or infinity"
    return kept, faults


def check_many(skipped: Mapping[str, str], images: int, least: int = ALWAYS) -> None:
    """Stop where so many images have no finite latent or embedding that the model must be at fault.

    Args:
        skipped: why images are left out, by name; other reasons are not counted.
        images: how many were looked at.
        least: how many are never too many.

    Raises:
        DataError: too many; the line names some.
    """
    lost = {name: why for name, why in skipped.items() if why.startswith((LATENT, EMBEDDING))}
    if len(lost) > max(least, ALLOWED * images):
        first = next(iter(lost.values()))
        raise DataError(
            f"cache: of {images} images {counted(lost)}: {first}; the autoencoder or a text encoder overflows: set "
            "run.mixed_precision to bf16 or no and cache.dtype to float32, or use another base.model"
        )
