"""What `davae evaluate enlarging` does: filters, networks and the upgrade itself enlarge the same reduced images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from davae.backbones.classes import goes_by_class
from davae.data.images import to_images, to_tensor
from davae.dataset.look import as_data, numbered_batches, prompts_of, real_pictures
from davae.errors import ModelError
from davae.evaluate.detail import PATCH_SIZE, compare_sets, measure_images
from davae.evaluate.features import make_extractor
from davae.evaluate.reconstruction import perceptual_distances, psnr, to_uint8_range
from davae.evaluate.upscale import make_upscaler
from davae.pretrained.open import default_resolution
from davae.pretrained.placement import FULL, Placement
from davae.recipes.sections import Data
from davae.sample.open import open_model
from davae.sample.upscale import check_enlarging, upscale
from davae.vae.blocks import downsample

Enlarger = Callable[[list[Image.Image], list[str]], list[Image.Image]]


def evaluate_enlarging(
    model: str,
    data: str | Data,
    *,
    num: int,
    held_out: float,
    methods: Sequence[str] = ("bicubic", "lanczos"),
    captions: bool = True,
    strength: float = 0.0,
    steps: int = 30,
    guidance: float = 1.0,
    seed: int = 0,
    faithful: bool = True,
    features: str = "lite0",
    feature_weights: Path | None = None,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    patch_size: int = PATCH_SIZE,
    batch_size: int = 8,
    placement: Placement = FULL,
    summary: Path | None = None,
) -> dict[str, Any]:
    """Reduce images by the model's scale, enlarge them by each method, and compare with the originals.

    Args:
        model: an upgraded model.
        data: images of at least the size that the model draws.
        methods: filters, weights of super-resolution networks, or commands, as `make_upscaler` takes them.
        captions: whether the upgrade gets the images' captions or classes as prompts.
        patch_size: side of the crops of the patch distance.

    Returns:
        Settings, and under `rows` for each method the distances between the sets (`patch_fd_lite0`, ...), `psnr`, the mean
        perceptual distances, `reduced_psnr` of the reduced result against the input, and `seconds` an image.

    Raises:
        ModelError: a model without a detail part, or a class model without prompts.
    """
    pipeline, _ = open_model(model, placement)
    check_enlarging(pipeline, strength=strength, steps=steps, times=1, batch_size=batch_size)
    size, scale = default_resolution(pipeline), pipeline.vae.layout.scale
    pictures = real_pictures(data, size, held_out, "held_out", summary=summary)
    originals, prompts = [], []
    for positions, images in numbered_batches(pictures, num, batch_size):
        originals.append(images)
        prompts += prompts_of(pictures, positions, goes_by_class(pipeline))
    if goes_by_class(pipeline) and not captions:
        raise ModelError("captions: a class-conditional model needs the classes of the images")
    real = torch.cat(originals)
    inputs = to_images(downsample(real, scale))

    def by_upgrade(images: list[Image.Image], texts: list[str]) -> list[Image.Image]:
        return upscale(
            pipeline, images, texts if captions else None, strength=strength, steps=steps, guidance_scale=guidance,
            seed=seed, faithful=faithful, batch_size=batch_size,
        )  # fmt: skip

    extractor, distances = make_extractor(features, feature_weights), perceptual_distances(lpips, lpips_weights)
    ways: dict[str, Enlarger] = {name: _by(make_upscaler(name, size)) for name in methods}
    ways["upgrade"] = by_upgrade
    measured = measure_images(real.split(batch_size), extractor, patch_size)
    rows = {}
    for name, way in ways.items():
        results, figures = _enlarged(way, inputs, prompts, real, scale, batch_size, distances)
        found = measure_images(results.split(batch_size), extractor, patch_size)
        rows[name] = figures | compare_sets(found, measured, extractor.name, patch_size)
    return {
        "model": model,
        "data": as_data(data).source,
        "held_out": held_out,
        "images": len(real),
        "from": size // scale,
        "to": size,
        "captions": captions,
        "strength": strength,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "faithful": faithful,
        **placement.changes,
        "rows": rows,
    }


def _by(enlarge: Callable[[list[Image.Image]], list[Image.Image]]) -> Enlarger:
    return lambda images, prompts: enlarge(images)


@torch.no_grad()
def _enlarged(
    way: Enlarger,
    inputs: list[Image.Image],
    prompts: list[str],
    real: Tensor,
    scale: int,
    batch_size: int,
    distances: dict[str, nn.Module],
) -> tuple[Tensor, dict[str, float]]:
    """Return all results (N,3,H,W) in [-1,1], and means over the images."""
    results, start = [], time.perf_counter()
    for first in range(0, len(inputs), batch_size):
        part = slice(first, first + batch_size)
        results += [to_tensor(image) for image in way(inputs[part], prompts[part])]
    seconds = (time.perf_counter() - start) / len(inputs)
    drawn, reduced = torch.stack(results), torch.stack([to_tensor(image) for image in inputs])
    figures = {
        "psnr": float(psnr(to_uint8_range(drawn), to_uint8_range(real)).mean()),
        "reduced_psnr": float(psnr(to_uint8_range(downsample(drawn, scale)), to_uint8_range(reduced)).mean()),
    }
    for name, distance in distances.items():
        parts = zip(drawn.split(batch_size), real.split(batch_size), strict=True)
        figures[name] = float(torch.cat([distance(one, other) for one, other in parts]).mean())
    return drawn, figures | {"seconds": seconds}
