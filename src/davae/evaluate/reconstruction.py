"""Reconstruction of held-out images: PSNR, SSIM, perceptual and Frechet distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from davae.dataset.encoding import coding_bytes, images_at_a_time
from davae.dataset.look import batches, data_figures, real_pictures
from davae.errors import ModelError
from davae.evaluate.distribution import frechet_distance
from davae.evaluate.features import Extractor, make_extractor
from davae.losses.perceptual import Lite0Distance, Lpips
from davae.pretrained.memory_budget import TILE, Halving
from davae.pretrained.placement import Precision
from davae.recipes.sections import Data
from davae.sample.finite import check_reconstruction
from davae.sample.open import open_autoencoder
from davae.vae.base import image_side
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range

WINDOW = 11  # pixels: SSIM's Gaussian


@dataclass(frozen=True)
class ReconstructionScores:
    """Means over images: PSNR in dB and SSIM of uint8-rounded pixels, and distances by name.

    `frechet`, by the name of its features, is the distance between the set of reconstructions and the set of originals.
    """

    psnr: float
    ssim: float
    pictures: int
    distances: dict[str, float] = field(default_factory=dict)
    frechet: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        return {"psnr": self.psnr, "ssim": self.ssim, **self.distances, **self.frechet, "pictures": self.pictures}


def to_uint8_range(images: Tensor) -> Tensor:
    """Return images in [-1,1] as values in [0,1], rounded as in a saved file."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 255.0


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, at most 100.

    Args:
        images, target: (B,3,H,W) in [0,1].

    Returns:
        (B,).
    """
    error = (images - target).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity (B,) of images (B,3,H,W) in [0,1] to their targets.

    Gaussian window of 11 with sigma 1.5, averaged where the window fits, as published and as scikit-image has it;
    torchmetrics' own mean includes a mirrored border.
    """
    _, whole = structural_similarity_index_measure(images, target, data_range=1.0, return_full_image=True)
    border = WINDOW // 2
    return whole[..., border:-border, border:-border].flatten(1).mean(1)


def perceptual_distances(lpips: str | None, weights: str | None) -> dict[str, nn.Module]:
    """Return perceptual distances by name: lite0, and LPIPS where a network is named.

    Args:
        lpips: `alex`, `vgg` or None.
        weights: file of its weights.

    Raises:
        ModelError: weights that are not LPIPS's, that cannot be had, or that no network reads.
    """
    if lpips is None and weights is not None:
        raise ModelError(f"--lpips-weights {weights}: read by --lpips alex or vgg; give both, or neither")
    found: dict[str, nn.Module] = {"lite0": Lite0Distance()}
    if lpips is not None:
        try:
            found[f"lpips_{lpips}"] = Lpips(lpips, weights)
        except ValueError as error:
            raise ModelError(str(error)) from error
    return found


@torch.no_grad()
def score_reconstructions(
    batches: Iterable[Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    distances: Mapping[str, nn.Module] | None = None,
    extractor: Extractor | None = None,
    *,
    shared: bool = False,
) -> ReconstructionScores:
    """Return scores of reconstructions, independent of the batch size.

    Args:
        shared: each process of a launch passes its own part of the images, and all get the scores of the whole set.
        distances: modules (images, target) -> (B,), by the name to report; lite0 by default.
        extractor: features for the Frechet distance between reconstructions and originals (rFID); None leaves it out.

    Raises:
        ValueError: when there are no images.
        ModelError: a reconstruction that is not finite.
    """
    distances = {"lite0": Lite0Distance()} if distances is None else distances
    rows: list[Tensor] = []
    features: list[tuple[Tensor, Tensor]] = []
    count = 0
    for images in batches:
        found = to_uint8_range(check_reconstruction(reconstruct(images), count))
        count += len(images)
        target = to_uint8_range(images.to(found.device))
        signed = found * 2 - 1, target * 2 - 1
        scores = [
            psnr(found, target),
            ssim(found, target),
            *(d.to(found.device)(*signed) for d in distances.values()),
        ]
        rows.append(torch.stack([score.cpu().double() for score in scores], dim=1))  # (B,2+distances)
        if extractor is not None:
            features.append((extractor(signed[0]).features.cpu(), extractor(signed[1]).features.cpu()))
    if shared:
        rows, features = gather_object(rows), gather_object(features)
    if not rows:
        raise ValueError("no images to reconstruct")
    table = torch.cat(rows)
    means = table.mean(0).tolist()
    frechet = {}
    if extractor is not None:
        frechet[f"r{extractor.name}"] = frechet_distance(*(torch.cat(side) for side in zip(*features, strict=True)))
    return ReconstructionScores(means[0], means[1], len(table), dict(zip(distances, means[2:], strict=True)), frechet)


def coding_parts(what: str, vae: Any, pixels: int, given: int | None = None) -> Halving:
    """Return how many images an autoencoder codes at a time, fewer when memory runs out.

    Args:
        what: the work, for the log.
        vae: the autoencoder, on its device; a DetailVAE takes tiles where one image does not fit.
        pixels: side of the images.
        given: the user's own number.
    """
    chosen = images_at_a_time(given, 16, vae.device, lambda: coding_bytes(vae, pixels, vae.dtype))
    return Halving(what, chosen, (lambda: vae.enable_tiling(TILE)) if isinstance(vae, DetailVAE) else None)


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
    """Measure the reconstructions of an autoencoder.

    Args:
        batch_size: images at a time; None takes what the memory plan allows. Fewer when memory runs out.
        precision: of the autoencoder.

    Raises:
        ModelError: a resolution that the autoencoder or SSIM does not take.
    """
    distances = perceptual_distances(lpips, lpips_weights)
    extractor = make_extractor(features or "lite0", feature_weights) if features or feature_weights else None
    model: Any = open_autoencoder(vae).to(getattr(torch, precision))
    size = image_side(model, resolution, least=WINDOW)

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        return decode_in_range(model, encode_in_range(model, images))  # (B,3,H,W)

    dataset = real_pictures(data, size, held_out, "held_out", summary=summary)
    halving = coding_parts("reconstruction", model, size, batch_size)
    parts = batches(dataset, num, halving.size, shared=True)
    scores = score_reconstructions(parts, partial(halving, reconstruct), distances, extractor, shared=True)
    settings = {} if precision == "float32" else {"dtype": precision}
    return {
        "vae": vae,
        **data_figures(data),
        "held_out": held_out,
        "resolution": size,
        **settings,
        **scores.as_dict(),
    }
