"""Distances of samples, drawn by a model or read from files, to real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from davae.backbones.classes import goes_by_class
from davae.data.conditions import NEEDS_CLASSES
from davae.data.images import ImageDataset
from davae.dataset.look import as_data, batches, data_figures, real_pictures
from davae.dataset.opened import with_counts
from davae.errors import DataError, ModelError, UnreadableImage
from davae.evaluate.detail import PATCH_SIZE, ImageSet, compare_sets, measure_images
from davae.evaluate.distribution import LEAST, check_enough, stored_gaussian
from davae.evaluate.drawn import check_keep, drawn_batches
from davae.evaluate.features import Extractor, make_extractor
from davae.evaluate.real_set import real_images
from davae.evaluate.spectra import draw_spectra
from davae.evaluate.upscale import make_upscaler
from davae.files.outputs import check_image
from davae.pretrained.shapes import default_resolution
from davae.pretrained.text_encoders import pipeline_limits
from davae.recipes.sections import Data
from davae.sample.generate import checked_size
from davae.sample.open import SamplingOptions, check_class_prompts, open_model


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
    """Measure two sets of images on disk.

    FID to an `.npz` with `mu` and `sigma` is taken to these, as ADM's own evaluator does; the other distances to its
    images.

    Args:
        generated: the images to measure: a folder, a `.tar` or an `.npz`.
        data: real images.
        resolution: pixels at which both sets are compared.
        num: most images of each set.
        features: network of the distances, `lite0` or `inception`.
        feature_weights: file of the Inception weights.
        patch_size: side of the crops of the patch distance, pixels; 0 leaves it out.
        spectrum: PNG to draw both power spectra into.
        summary: file of the summary of the data.

    Returns:
        The figures of `davae evaluate pictures`.
    """
    if spectrum is not None:
        check_image(spectrum)
    extractor, real = make_extractor(features, feature_weights), as_data(data)
    stored = stored_gaussian(Path(real.source)) if real.source.endswith(".npz") and extractor.name == "fid" else None
    # options of captions and tables are those of the real images
    drawn = Data(source=generated, enlarge=real.enlarge, background=real.background, max_pixels=real.max_pixels)
    both = [  # opened before either is measured
        real_pictures(source, resolution, 0.0, "train", summary=path)
        for source, path in ((drawn, None), (real, summary))
    ]
    check_enough(*(len(images) if num is None else min(len(images), num) for images in both))
    samples, originals = (measure_images(batches(images, num), extractor, patch_size) for images in both)
    if stored is not None and (size := both[1].source.size(0)) != (resolution, resolution):
        raise DataError(
            f"--resolution {resolution}: mu and sigma in {real.source} belong to images of {size[0]} x {size[1]} pixels; "
            "give that size, or a file without mu and sigma"
        )
    reference = {} if stored is None else {"fid_reference": "mu and sigma stored in the data"}
    figures = compare_sets(samples, originals, extractor.name, patch_size, stored)
    if spectrum is not None:
        draw_spectra(spectrum, samples.spectrum, originals.spectrum)
    return {"pictures": generated, **data_figures(real), "resolution": resolution, **figures, **reference}


def condition_of(images: ImageDataset, place: int, pipeline: Any) -> str:
    """Return the prompt of an image: its caption, or its class for a class-conditional pipeline.

    No pixels are decoded. Where it cannot be read, the next image's is taken, as training does.

    Args:
        images: the images.
        place: position among them.
        pipeline: the pipeline that will draw.

    Raises:
        DataError: a class-conditional pipeline, and an image without a class.
    """
    index = images.indices[place]
    kind, read = ("label", images.source.label) if goes_by_class(pipeline) else ("caption", images.source.caption)
    try:
        condition: Any = read(index)
    except UnreadableImage:
        condition = images[(place, -1)][kind]
    if condition is None:
        raise DataError(NEEDS_CLASSES)
    return str(condition)


def evaluate_generation(
    pipeline: str,
    data: str | Data,
    options: SamplingOptions,
    *,
    num: int,
    compare_at: int | None,
    held_in: float,
    features: str,
    feature_weights: Path | None,
    on_batch: Callable[[int, int], None],
    upscale: str = "bilinear",
    patch_size: int = PATCH_SIZE,
    spectrum: Path | None = None,
    summary: Path | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Compare samples with real images of the same captions or classes.

    Args:
        pipeline: the model, by the names that `open_model` takes.
        data: real images; of a split that holds out the share `held_in` only the training side.
        options: how `num` samples are drawn.
        compare_at: pixels at which both sets are compared; None is the size of the samples.
        features, feature_weights: `lite0` or `inception`, and the file of Inception's weights.
        on_batch: called with the drawn samples and their number.
        upscale: enlarger of the samples, as `make_upscaler` takes it.
        patch_size: side of the crops of the patch distance, in pixels; 0 leaves the distance out.
        spectrum, summary: files for a plot of both power spectra, and for the summary of the data.
        keep: folder of the samples before enlarging and of the real images' measurements, for later calls.

    Returns:
        The figures of `davae evaluate generation`.

    Raises:
        ModelError: a size or a class that the model lacks, or too few images.
    """
    _check_arguments(num, spectrum, keep, pipeline, data)
    extractor = make_extractor(features, feature_weights)
    model, drawn_at = _opened(pipeline, options)
    size = compare_at or drawn_at
    limits = [] if goes_by_class(model) else with_counts(pipeline_limits(model))
    images = real_pictures(data, size, held_in, "train", summary=summary, limits=limits)
    enlarge = make_upscaler(upscale, size) if size != drawn_at else None
    prompts = _chosen_prompts(images, num, options.seed, model)
    drawn_in, kept_real = (None, None) if keep is None else (keep / "drawn", keep / "real")
    real = real_images(images, as_data(data), held_in, features, feature_weights, patch_size, kept_real)
    drawn = drawn_batches(pipeline, model, prompts, options, enlarge, on_batch, drawn_in)
    figures = _compared(drawn, real, extractor, patch_size, spectrum)
    return {
        "pipeline": pipeline,
        **data_figures(data),
        "held_in": held_in,
        "dtype": options.placement.precision,
        **figures,
        "resolution": drawn_at,
        "compared_at": size,
        "upscale": upscale if enlarge else None,
        **options.figures,
    }


def _compared(
    drawn: Iterator[Tensor], real: ImageSet, extractor: Extractor, patch_size: int, spectrum: Path | None
) -> dict[str, float]:
    samples = measure_images(drawn, extractor, patch_size)
    if spectrum is not None:
        draw_spectra(spectrum, samples.spectrum, real.spectrum)
    return compare_sets(samples, real, extractor.name, patch_size)


def _check_arguments(num: int, spectrum: Path | None, keep: Path | None, pipeline: str, data: str | Data) -> None:
    check_keep(keep, pipeline, as_data(data).source)
    if spectrum is not None:
        check_image(spectrum)
    if num < LEAST:
        raise ModelError(f"--num {num}: at least {LEAST} images are needed to compare with")


def _opened(name: str, options: SamplingOptions) -> tuple[Any, int]:
    """Return a model, and the side at which it draws."""
    model, _ = open_model(name, options.placement)
    checked_size(model, options.resolution)
    return model, options.side or default_resolution(model)


def _chosen_prompts(images: ImageDataset, num: int, seed: int, model: Any) -> list[str]:
    """Return the prompts of `num` images in random order, repeated where there are fewer images."""
    check_enough(num, len(images))
    order = np.random.default_rng(seed % 2**64).permutation(max(num, len(images)))[:num] % len(images)
    prompts = [condition_of(images, int(i), model) for i in order]
    check_class_prompts(model, prompts)
    return prompts
