"""Reconstruction of held-out pictures: PSNR, SSIM and a perceptual distance, per picture, then averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from davae.losses.perceptual import Lite0Distance


@dataclass(frozen=True)
class ReconstructionScores:
    """Means over pictures. psnr in dB and ssim on uint8-rounded pixels in [0,1]; lite0 is `Lite0Distance`."""

    psnr: float
    ssim: float
    lite0: float
    pictures: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def to_uint8_range(images: Tensor) -> Tensor:
    """[-1,1] -> [0,1], rounded as a saved file would be."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 255.0


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,3,H,W) in [0,1] twice -> (B,). Capped at 100."""
    error = (images - target).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


@torch.no_grad()
def score_reconstructions(
    batches: Iterable[Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    perceptual: Lite0Distance | None = None,
) -> ReconstructionScores:
    """Scores of `reconstruct` over batches of pictures (B,3,H,W) in [-1,1]; independent of the batch size.

    Raises:
        ValueError: when there are no pictures.
    """
    perceptual = perceptual or Lite0Distance()
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for images in batches:
        found, wanted = to_uint8_range(reconstruct(images)), to_uint8_range(images)
        ssim = structural_similarity_index_measure(found, wanted, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        values = torch.stack([psnr(found, wanted), ssim.flatten(), perceptual(found * 2 - 1, wanted * 2 - 1)])
        sums += values.double().sum(1).cpu()
        count += len(images)
    if not count:
        raise ValueError("no pictures to reconstruct")
    mean = (sums / count).tolist()
    return ReconstructionScores(*mean, pictures=count)
