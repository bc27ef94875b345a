"""What `davae sample` and `davae evaluate` do: open a model by name, draw from it, measure it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from davae.backbones.classes import goes_by_class
from davae.data.formats import open_image
from davae.data.images import ImageDataset, to_tensor
from davae.dataset.encoding import coding_bytes, images_at_a_time
from davae.dataset.look import as_data, batches, real_pictures
from davae.dataset.opened import with_counts
from davae.errors import DataError, ModelError
from davae.evaluate.detail import PATCH_SIZE, ImageSet, compare_sets, measure_images
from davae.evaluate.distribution import LEAST, stored_gaussian
from davae.evaluate.features import make_extractor
from davae.evaluate.reconstruction import perceptual_distances, score_reconstructions
from davae.evaluate.spectra import image_spectra_plot
from davae.evaluate.throughput import time_pipelines
from davae.evaluate.upscale import make_upscaler
from davae.files.outputs import check_image, save_image
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.memory_budget import TILE, Halving
from davae.pretrained.open import default_resolution
from davae.pretrained.placement import FULL, Placement, Precision, own_device
from davae.pretrained.text_encoders import pipeline_limits
from davae.recipes.sections import Data
from davae.sample.generate import generate
from davae.sample.open import check_classes, open_model
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import decode_latents, encode_mode
from davae.vae.overflow import in_range
from davae.zoo import SHIPPED, UPGRADES, resolve


def open_autoencoder(name: str) -> Any:
    """A DetailVAE or any supported diffusers autoencoder on this process's device, by folder, run or embedded model."""
    place = str(UPGRADES[SHIPPED[name]] / "vae") if name in SHIPPED else resolve(name)
    return load_autoencoder(place).to(own_device())


def evaluate_reconstruction(
    vae: str,
    data: str | Data,
    resolution: int | None,
    num: int | None,
    held_out: float,
    *,
    summary: Path | None = None,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    features: str | None = None,
    feature_weights: Path | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Return the figures of `davae evaluate reconstruction`.

    Args:
        batch_size: images at a time; None takes what the memory plan allows. Fewer when memory runs out.
        precision: of the autoencoder.
    """
    dtype = getattr(torch, precision)
    model: Any = open_autoencoder(vae).to(dtype)
    own = model.config.get("sample_size")  # some classes have none
    if resolution is None and own is None:
        raise ModelError(f"{vae}: an {type(model).__name__} does not say its size; give --resolution")
    size = int(resolution or own)
    distances = perceptual_distances(lpips, lpips_weights)
    extractor = None if features is None else make_extractor(features, feature_weights)

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        latents = in_range(model, partial(encode_mode, model), images)  # (B,C,h,w)
        return in_range(model, partial(decode_latents, model), latents)  # (B,3,H,W)

    pictures = real_pictures(data, size, held_out, "held_out", summary=summary)
    chosen = images_at_a_time(batch_size, 16, model.device, lambda: coding_bytes(model, size, dtype))
    tiles = (lambda: model.enable_tiling(TILE)) if isinstance(model, DetailVAE) else None
    parts = batches(pictures, num, chosen, shared=True)
    halved = partial(Halving("reconstruction", chosen, tiles), reconstruct)
    scores = score_reconstructions(parts, halved, distances, extractor, shared=True)
    settings = {} if precision == "float32" else {"dtype": precision}
    return {
        "vae": vae,
        "data": as_data(data).source,
        "held_out": held_out,
        "resolution": size,
        **settings,
        **scores.as_dict(),
    }


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
        draw_spectra(spectrum, samples, originals)
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


def draw_spectra(target: Path, generated: ImageSet, real: ImageSet) -> None:
    """Write the mean power spectra of two sets as a PNG."""
    plot = image_spectra_plot({"real": real.spectrum, "generated": generated.spectrum})
    save_image(open_image(io.BytesIO(plot)), target)


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
        draw_spectra(spectrum, samples, real)
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


@dataclass(frozen=True)
class Candidate:
    """A way to a picture, to be timed: what `pipeline` draws at `resolution` pixels, brought to `compare_at` by `upscale`.

    Sizes that are None are the model's own, and the drawn one.
    """

    name: str
    pipeline: str
    resolution: int | None = None
    compare_at: int | None = None
    upscale: str = "bilinear"


def time_pictures(
    candidates: Sequence[Candidate], data: str | Data, *, steps: int, guidance: float, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Tokens and median seconds of one picture by each candidate, enlarging included; they take turns.

    Args:
        data: pictures whose first caption or class is drawn.
    """
    entries: list[tuple[str, Any, int, Callable[[Any], Any]]] = []
    prompt = ""
    for candidate in candidates:
        model, _ = open_model(candidate.pipeline)
        size = candidate.resolution or default_resolution(model)
        final = candidate.compare_at or size
        enlarge = make_upscaler(candidate.upscale, final) if size != final else None
        finish = partial(enlarged, enlarge) if enlarge else lambda picture: picture
        entries.append((candidate.name, model, size, finish))
        prompt = prompt or condition_of(real_pictures(data, final, 0.0, "train")[(0, -1)], model)
    timings = time_pipelines(entries, prompt, steps=steps, guidance_scale=guidance, repeats=repeats)
    return {
        timing.name: {
            "tokens": timing.tokens,
            "seconds": timing.whole,
            "transformer_seconds": timing.transformer,
            "images_per_second": 1 / timing.whole,
            "repeats": repeats,
        }
        for timing in timings
    }


def enlarged(enlarge: Callable[[list[Any]], list[Any]], picture: Any) -> Any:
    """One picture by an upscaler of several."""
    return enlarge([picture])[0]
