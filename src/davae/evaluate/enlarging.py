"""Enlarging measured: filters, networks and the upgrade enlarge the same reduced images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from davae.backbones.classes import goes_by_class
from davae.data.images import ImageDataset, to_images, to_tensor
from davae.dataset.look import data_figures, images_and_prompts, real_pictures
from davae.errors import ModelError
from davae.evaluate.detail import PATCH_SIZE, compare_sets, measure_images
from davae.evaluate.distribution import LEAST
from davae.evaluate.features import Extractor, make_extractor
from davae.evaluate.reconstruction import perceptual_distances, psnr, to_uint8_range
from davae.evaluate.upscale import Upscaler, make_upscaler
from davae.pretrained.shapes import default_resolution
from davae.recipes.sections import Data
from davae.sample.open import SamplingOptions, check_class_prompts, open_model
from davae.sample.upscale import PASSES, back_projected, check_enlarging, upscale
from davae.vae.blocks import downsample
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range

CEILING = "originals, decoded"  # by the upgrade's autoencoder, as faithful as its row: what drawing comes near to


def evaluate_enlarging(
    model: str,
    data: str | Data,
    options: SamplingOptions,
    *,
    num: int,
    held_out: float,
    methods: Sequence[str] = ("bicubic", "lanczos"),
    captions: bool = True,
    strength: float = 0.0,
    faithful: bool = True,
    features: str = "lite0",
    feature_weights: Path | None = None,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    patch_size: int = PATCH_SIZE,
    summary: Path | None = None,
) -> dict[str, Any]:
    """Enlarge reduced images by each method, and compare the results with the originals.

    Args:
        model: an upgraded model.
        data: images of at least the size that the model draws; `num` of the held-out share, or of all at 0.
        options: how the upgrade draws, and the batch size of all methods.
        methods: filters, weights of super-resolution networks, or commands, as `make_upscaler` takes them.
        captions: whether upgrades get captions or classes as prompts.
        strength, faithful: as `davae.upscale` takes them.
        features, feature_weights, lpips, lpips_weights, patch_size: networks, their weights and the side of the crops.

    Returns:
        Settings, and under `rows` for each method and for `CEILING`: distances between the sets, `psnr`, mean perceptual
        distances, `reduced_psnr` of the reduced result against the input, and `seconds` an image.

    Raises:
        ModelError: too few images, a model without a detail part, or a class model without prompts.
    """
    if num < LEAST:
        raise ModelError(f"--num {num}: at least {LEAST} images are needed to compare with")
    extractor, distances = make_extractor(features, feature_weights), perceptual_distances(lpips, lpips_weights)
    pipeline, _ = open_model(model, options.placement)
    check_enlarging(pipeline, strength=strength, steps=options.steps, times=1, batch_size=options.batch_size)
    size = default_resolution(pipeline)
    ways = {name: make_upscaler(name, size) for name in methods}
    images = real_pictures(data, size, held_out, "held_out", summary=summary)
    pairs = _reduced(images, num, options.batch_size, pipeline, captions, PASSES * (faithful and strength == 0.0))
    ways["upgrade"] = _by_upgrade(pipeline, options, strength, faithful)
    return {
        "model": model,
        **data_figures(data),
        "held_out": held_out,
        "images": len(pairs.real),
        "from": size // pairs.scale,
        "to": size,
        "captions": captions,
        "strength": strength,
        **options.figures,
        "faithful": faithful,
        **options.placement.changes,
        "rows": _measured_rows(ways, pairs, options.batch_size, distances, extractor, patch_size, pipeline.vae),
    }


@dataclass(frozen=True)
class _Pairs:
    """Originals and inputs (N,3,sH,sW), (N,3,H,W) in [-1,1], prompts, back-projections."""

    real: Tensor
    reduced: Tensor
    inputs: list[Image.Image]
    prompts: list[str] | None
    scale: int
    passes: int


def _reduced(images: ImageDataset, num: int, batch_size: int, pipeline: Any, captions: bool, passes: int) -> _Pairs:
    by_class, scale = goes_by_class(pipeline), pipeline.vae.layout.scale
    if by_class and not captions:
        raise ModelError("captions: a class-conditional model needs the classes of the images")
    real, prompts = images_and_prompts(images, by_class, num, batch_size)
    check_class_prompts(pipeline, prompts)
    inputs = to_images(downsample(real, scale))
    return _Pairs(real, torch.stack([*map(to_tensor, inputs)]), inputs, prompts if captions else None, scale, passes)


def _measured_rows(
    ways: dict[str, Upscaler],
    pairs: _Pairs,
    batch_size: int,
    distances: dict[str, nn.Module],
    extractor: Extractor,
    patch_size: int,
    vae: DetailVAE,
) -> dict[str, dict[str, float]]:
    real, rows = measure_images(pairs.real.split(batch_size), extractor, patch_size), {}

    def row(results: Tensor, seconds: float) -> dict[str, float]:
        found = measure_images(results.split(batch_size), extractor, patch_size)
        figures = _means(results, pairs, batch_size, distances)
        return {**figures, "seconds": seconds, **compare_sets(found, real, extractor.name, patch_size)}

    for name, way in ways.items():
        rows[name] = row(*_enlarged(way, pairs, batch_size))
    rows[CEILING] = row(*_decoded(vae, pairs, batch_size))
    return rows


def _by_upgrade(pipeline: Any, options: SamplingOptions, strength: float, faithful: bool) -> Upscaler:
    def enlarge(images: list[Image.Image], prompts: Sequence[str] | None = None) -> list[Image.Image]:
        return upscale(
            pipeline, images, prompts, strength=strength, steps=options.steps,
            guidance_scale=options.guidance, seed=options.seed, faithful=faithful, batch_size=options.batch_size,
        )  # fmt: skip

    return enlarge


def _enlarged(way: Upscaler, pairs: _Pairs, batch_size: int) -> tuple[Tensor, float]:
    """Return all results (N,3,sH,sW) in [-1,1], and the seconds of one."""
    results, start, inputs = [], time.perf_counter(), pairs.inputs
    for first in range(0, len(inputs), batch_size):
        part = slice(first, first + batch_size)
        results += [to_tensor(image) for image in way(inputs[part], pairs.prompts and pairs.prompts[part])]
    return torch.stack(results), (time.perf_counter() - start) / len(inputs)


@torch.no_grad()
def _decoded(vae: DetailVAE, pairs: _Pairs, batch_size: int) -> tuple[Tensor, float]:
    """Return the originals (N,3,sH,sW), encoded and decoded, and the seconds of one."""
    start, parts = time.perf_counter(), pairs.real.split(batch_size)
    found = torch.cat([decode_in_range(vae, encode_in_range(vae, part)).float().cpu() for part in parts])
    return back_projected(found, pairs.reduced, pairs.scale, pairs.passes), (time.perf_counter() - start) / len(found)


@torch.no_grad()
def _means(results: Tensor, pairs: _Pairs, batch_size: int, distances: dict[str, nn.Module]) -> dict[str, float]:
    """Return mean distances to the originals, and of the reduced results to the inputs."""
    again = downsample(results, pairs.scale)
    figures = {
        "psnr": float(psnr(to_uint8_range(results), to_uint8_range(pairs.real)).mean()),
        "reduced_psnr": float(psnr(to_uint8_range(again), to_uint8_range(pairs.reduced)).mean()),
    }
    for name, distance in distances.items():
        parts = zip(results.split(batch_size), pairs.real.split(batch_size), strict=True)
        figures[name] = float(torch.cat([distance(one, other) for one, other in parts]).mean())
    return figures
