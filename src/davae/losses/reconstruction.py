"""L_rec of Eq. 5: lambda_L LPIPS + lambda_1 L1 + lambda_adv adversarial + lambda_KL KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ReconstructionLoss:
    """Terms of Eq. 5: `total` without the adversarial one, `pixel` of LPIPS and L1, and means.

    `kl` is 0 for a deterministic autoencoder.
    """

    total: Tensor
    pixel: Tensor
    l1: Tensor
    lpips: Tensor
    kl: Tensor


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL (Eq. 5) of a diagonal Gaussian from N(0, I), summed over a latent."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def reconstruction_loss(
    reconstruction: Tensor,
    images: Tensor,
    mean: Tensor | None,
    logvar: Tensor | None,
    perceptual: nn.Module | None,
    *,
    lambda_lpips: float,
    lambda_l1: float,
    lambda_kl: float,
) -> ReconstructionLoss:
    """Return L1 + LPIPS + KL of Eq. 5, in float32 whatever the autocast dtype.

    Args:
        reconstruction, images: (B,3,H,W) in [-1,1].
        mean, logvar: of the posterior of z_d, (B,D,h,w); None for a deterministic autoencoder.
        perceptual: (images, target) -> (B,); None only where lambda_lpips is 0.
    """
    with torch.autocast(images.device.type, enabled=False):
        reconstruction, images = reconstruction.float(), images.float()
        l1 = F.l1_loss(reconstruction, images)
        lpips = perceptual(reconstruction, images).mean() if perceptual is not None else l1.new_zeros(())
        kl = l1.new_zeros(()) if mean is None or logvar is None else kl_loss(mean, logvar)
    pixel = lambda_lpips * lpips + lambda_l1 * l1
    return ReconstructionLoss(pixel + lambda_kl * kl, pixel, l1, lpips, kl)


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """Return L_adv of the autoencoder: minus the mean score of its reconstructions (Eq. 5)."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(above: Tensor, below: Tensor, maximum: float = 1e4) -> Tensor:
    """Return ||above|| / ||below||, of two losses' gradients at one parameter, in float32.

    Used for the GAN (above: reconstruction, below: adversarial, at the decoder's last layer) and for
    `alignment: adaptive` (above: reconstruction, below: alignment, at the encoder's last layer).
    """
    return (above.float().norm() / (below.float().norm() + 1e-6)).clamp(max=maximum).detach()


def gradient_at(output: Tensor, parameter: Tensor, upstream: Tensor, count: int | None = None) -> Tensor:
    """Return the float32 gradient at a parameter from the one at the output and keep the graph.

    The gradient of a mean over N values is about 1/N in each, which half precision rounds to zero on its way back. It travels
    multiplied by the power of two nearest to N, which changes no bit in float32.

    Args:
        output: what `upstream` is the gradient of, the same shape.
        count: N; the elements of `output` where not given.
    """
    factor = 2.0 ** round(math.log2(count or output.numel()))
    scaled = (upstream * factor).to(output.dtype)
    return torch.autograd.grad(output, parameter, scaled, retain_graph=True)[0].float() / factor


class _Carried(torch.autograd.Function):
    """A scalar whose gradient with respect to a tensor is known already."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0].to(gradient.dtype) * gradient, None, None


def with_known_gradient(tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """Return a scalar of this value whose backward pass gives `gradient` to `tensor`.

    The networks behind `value` (LPIPS, a discriminator) are differentiated once; adaptive weights and the training step
    share the result.
    """
    return _Carried.apply(tensor, gradient.to(tensor.dtype), value.detach())  # type: ignore[return-value]
