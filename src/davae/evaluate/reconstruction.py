"""Reconstruction of held-out pictures: PSNR, SSIM, perceptual distances per picture, Frechet distance of the sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from davae.errors import ModelError
from davae.evaluate.distribution import frechet_distance
from davae.evaluate.features import Extractor
from davae.losses.perceptual import Lite0Distance, Lpips
from davae.sample.finite import check_reconstruction

WINDOW = 11  # pixels: SSIM's Gaussian


@dataclass(frozen=True)
class ReconstructionScores:
    """Means over pictures. psnr in dB and ssim on uint8-rounded pixels in [0,1]; `distances` by name, e.g. lpips_alex.

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
    """[-1,1] -> [0,1], rounded as a saved file would be."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 255.0


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,3,H,W) in [0,1] twice -> (B,). Capped at 100."""
    error = (images - target).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,3,H,W) in [0,1] twice -> (B,).

    Gaussian window of 11 with sigma 1.5, averaged where the window fits, as published and as scikit-image has it;
    torchmetrics' own mean includes a mirrored border.
    """
    _, whole = structural_similarity_index_measure(images, target, data_range=1.0, return_full_image=True)
    border = WINDOW // 2
    return whole[..., border:-border, border:-border].flatten(1).mean(1)


def perceptual_distances(lpips: str | None, weights: str | None) -> dict[str, nn.Module]:
    """Return the distances of two images to report, by name: lite0, and LPIPS on a network where it is named.

    Raises:
        ModelError: weights that are not LPIPS's, or that cannot be had.
    """
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
    """Scores of `reconstruct` over batches of pictures (B,3,H,W) in [-1,1]; independent of the batch size.

    Args:
        shared: each process of a launch passes its own part of the images, and all get the scores of the whole set.
        distances: modules (images, target) -> (B,), by the name to report; lite0 by default.
        extractor: features for the Frechet distance between reconstructions and originals (rFID); None leaves it out.

    Raises:
        ValueError: when there are no pictures.
        ModelError: a reconstruction that is not finite.
    """
    distances = {"lite0": Lite0Distance()} if distances is None else distances
    rows: list[Tensor] = []
    features: list[tuple[Tensor, Tensor]] = []
    count = 0
    for images in batches:
        found = to_uint8_range(check_reconstruction(reconstruct(images), count))
        count += len(images)
        wanted = to_uint8_range(images.to(found.device))
        signed = found * 2 - 1, wanted * 2 - 1
        scores = [
            psnr(found, wanted),
            ssim(found, wanted),
            *(d.to(found.device)(*signed) for d in distances.values()),
        ]
        rows.append(torch.stack([score.cpu().double() for score in scores], dim=1))  # (B,2+distances)
        if extractor is not None:
            features.append((extractor(signed[0]).features.cpu(), extractor(signed[1]).features.cpu()))
    if shared:
        rows, features = gather_object(rows), gather_object(features)
    if not rows:
        raise ValueError("no pictures to reconstruct")
    table = torch.cat(rows)
    means = table.mean(0).tolist()
    frechet = {}
    if extractor is not None:
        frechet[f"r{extractor.name}"] = frechet_distance(*(torch.cat(side) for side in zip(*features, strict=True)))
    return ReconstructionScores(means[0], means[1], len(table), dict(zip(distances, means[2:], strict=True)), frechet)
