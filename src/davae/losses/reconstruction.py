"""L_rec of Eq. 5: lambda_L LPIPS + lambda_1 L1 + lambda_adv adversarial + lambda_KL KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ReconstructionLoss:
    """`total` is Eq. 5 without its adversarial term; the fields are unweighted means."""

    total: Tensor
    l1: Tensor
    lpips: Tensor
    kl: Tensor


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of a diagonal Gaussian from the standard normal, summed over a latent and averaged over the batch."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def reconstruction_loss(
    reconstruction: Tensor,
    images: Tensor,
    mean: Tensor,
    logvar: Tensor,
    perceptual: nn.Module | None,
    *,
    lambda_lpips: float,
    lambda_l1: float,
    lambda_kl: float,
) -> ReconstructionLoss:
    """L1 + LPIPS + KL of Eq. 5, in float32 whatever the autocast dtype.

    Args:
        reconstruction, images: (B,3,H,W) in [-1,1].
        mean, logvar: the posterior of z_d, (B,D,h,w).
        perceptual: (images, target) -> (B,); None only where lambda_lpips is 0.
    """
    with torch.autocast(images.device.type, enabled=False):
        reconstruction, images = reconstruction.float(), images.float()
        l1 = F.l1_loss(reconstruction, images)
        lpips = perceptual(reconstruction, images).mean() if perceptual is not None else l1.new_zeros(())
        kl = kl_loss(mean, logvar)
    total = lambda_lpips * lpips + lambda_l1 * l1 + lambda_kl * kl
    return ReconstructionLoss(total, l1, lpips, kl)


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """L_adv for the autoencoder: minus the mean score of its reconstructions."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(numerator: Tensor, denominator: Tensor, parameter: Tensor, maximum: float = 1e4) -> Tensor:
    """||grad numerator|| / ||grad denominator|| at one parameter: puts two losses on one scale, in float32.

    Used for the GAN (numerator: reconstruction, denominator: adversarial, at the decoder's last layer) and for
    `alignment: adaptive` (numerator: reconstruction, denominator: alignment, at the encoder's last layer).
    """
    above = torch.autograd.grad(numerator, parameter, retain_graph=True)[0].float().norm()
    below = torch.autograd.grad(denominator, parameter, retain_graph=True)[0].float().norm()
    return (above / (below + 1e-6)).clamp(max=maximum).detach()
