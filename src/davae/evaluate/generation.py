"""What `davae sample` and `davae evaluate` do: open a model by name, draw from it, measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from davae.backbones.classes import goes_by_class
from davae.data.images import ImageDataset, to_tensor
from davae.dataset.look import as_data, batches, real_pictures
from davae.dataset.opened import with_counts
from davae.errors import DataError, ModelError
from davae.evaluate.detail import PATCH_SIZE, ImageSet, compare_sets, measure_images
from davae.evaluate.distribution import LEAST, stored_gaussian
from davae.evaluate.features import make_extractor
from davae.evaluate.spectra import draw_spectra
from davae.evaluate.upscale import make_upscaler
from davae.files.outputs import check_image
from davae.pretrained.open import default_resolution
from davae.pretrained.placement import FULL, Placement
from davae.pretrained.text_encoders import pipeline_limits
from davae.recipes.sections import Data
from davae.sample.generate import generate
from davae.sample.open import check_classes, open_model


def evaluate_pictures(
    generated: str,
    data: str | Data,
    resolution: int,
    *,
    num: int | None,
    features: str,
    feature_weights: Path | None,
    patch_size: int = PATCH_SIZE,
    spectrum: Path | None = None,
    summary: Path | None = None,
) -> dict[str, Any]:
    """Measure two sets of images on disk; the figures of `davae evaluate pictures`.

    FID to an `.npz` with `mu` and `sigma` is taken to these, as ADM's own evaluator does; all else to its images.

    Args:
        patch_size: side of the crops of the patch distance, pixels; 0 leaves it out.
        spectrum: PNG to draw both power spectra into.
    """
    if spectrum is not None:
        check_image(spectrum)
    extractor, real = make_extractor(features, feature_weights), as_data(data)
    stored = stored_gaussian(Path(real.source)) if real.source.endswith(".npz") and extractor.name == "fid" else None
    # options of captions and tables are those of the real images
    drawn = Data(source=generated, enlarge=real.enlarge, background=real.background, max_pixels=real.max_pixels)
    samples, originals = (
        measure_images(
            batches(real_pictures(source, resolution, 0.0, "train", summary=path), num), extractor, patch_size
        )
        for source, path in ((drawn, None), (real, summary))
    )
    reference = {} if stored is None else {"fid_reference": "mu and sigma stored in the data"}
    figures = compare_sets(samples, originals, extractor.name, patch_size, stored)
    if spectrum is not None:
        draw_spectra(spectrum, samples.spectrum, originals.spectrum)
    return {"pictures": generated, "data": real.source, "resolution": resolution, **figures, **reference}


def condition_of(picture: dict[str, Any], pipeline: Any) -> str:
    """What a model is asked for to get a picture like this one: its class where the pipeline goes by classes."""
    if not goes_by_class(pipeline):
        return picture["caption"]
    if picture["label"] is None:
        raise DataError(
            "a class-conditional model is measured on pictures with classes: sub-folders, or `.cls` files"
        )
    return str(picture["label"])


_real: dict[tuple[str, int, float, str, Path | None, int], ImageSet] = {}


def real_images(
    pictures: ImageDataset, data: Data, held_in: float, features: str, weights: Path | None, patch_size: int = 0
) -> ImageSet:
    """Measure a set of real images, kept for the next model that is compared with it."""
    key = data.model_dump_json(), pictures.resolution, held_in, features, weights, patch_size
    if key not in _real:
        _real[key] = measure_images(batches(pictures), make_extractor(features, weights), patch_size)
    return _real[key]


def evaluate_generation(
    pipeline: str,
    data: str | Data,
    *,
    num: int,
    resolution: int | None,
    compare_at: int | None,
    steps: int,
    guidance: float,
    seed: int,
    held_in: float,
    features: str,
    feature_weights: Path | None,
    on_batch: Callable[[int, int], None],
    upscale: str = "bilinear",
    placement: Placement = FULL,
    batch_size: int = 32,
    patch_size: int = PATCH_SIZE,
    spectrum: Path | None = None,
    summary: Path | None = None,
) -> dict[str, Any]:
    """Compare samples with real images of the same captions or classes; the figures of `davae evaluate generation`.

    Args:
        patch_size: side of the crops of the patch distance, pixels at the size of comparison; 0 leaves it out.
        spectrum: PNG to draw both power spectra into.
    """
    if spectrum is not None:
        check_image(spectrum)
    if num < LEAST:
        raise ModelError(f"--num {num}: at least {LEAST} pictures are needed to compare with")
    model, _ = open_model(pipeline, placement)
    own = default_resolution(model)
    size = compare_at or resolution or own
    limits = [] if goes_by_class(model) else with_counts(pipeline_limits(model))
    pictures = real_pictures(data, size, held_in, "train", summary=summary, limits=limits)
    order = np.random.default_rng(seed).permutation(max(num, len(pictures)))[:num] % len(pictures)
    prompts = [condition_of(pictures[(int(i), -1)], model) for i in order]
    check_classes(model, prompts)
    extractor = make_extractor(features, feature_weights)
    enlarge = make_upscaler(upscale, size) if size != (resolution or own) else None
    part = 2 * batch_size

    def drawn() -> Iterator[Tensor]:
        for start in range(0, num, part):
            samples = generate(
                model,
                prompts[start : start + part],
                resolution=resolution,
                steps=steps,
                guidance_scale=guidance,
                seed=seed,
                first=start,
                batch_size=batch_size,
            )
            yield torch.stack([to_tensor(sample) for sample in (enlarge(samples) if enlarge else samples)])
            on_batch(min(start + part, num), num)

    real = real_images(pictures, as_data(data), held_in, features, feature_weights, patch_size)
    samples = measure_images(drawn(), extractor, patch_size)
    figures = compare_sets(samples, real, extractor.name, patch_size)
    if spectrum is not None:
        draw_spectra(spectrum, samples.spectrum, real.spectrum)
    return {
        "pipeline": pipeline,
        "data": as_data(data).source,
        "held_in": held_in,
        "dtype": placement.precision,
        **figures,
        "resolution": resolution or own,
        "compared_at": size,
        "upscale": upscale if enlarge else None,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
    }
