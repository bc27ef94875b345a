"""Rectified flow: x_t = (1 - t) x_0 + t noise, velocity = noise - x_0, t in [0,1] with t = 1 pure noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path. latents, noise (B,c,h,w); t (B,) -> (B,c,h,w)."""
    t = t.reshape(-1, *[1] * (latents.ndim - 1))  # (B,1,1,1)
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x_0, (B,c,h,w)."""
    return noise - latents


def direction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of predicted and true velocity along the channel axis, averaged: LightningDiT's second term.

    prediction, target (B,c,h,w) -> scalar in [0,2].
    """
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()


def shift_timestep(t: Tensor, shift: float) -> Tensor:
    """shift*t / (1 + (shift-1)*t): the resolution-dependent shift of SD3; shift = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor, *, mean: float, std: float, shift: float) -> Tensor:
    """t = sigmoid(mean + std * normal), then shifted; any shape, in (0,1)."""
    return shift_timestep(torch.sigmoid(mean + std * normal), shift)


def sample_timesteps(
    batch_size: int,
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logit-normal t = sigmoid(mean + std * normal), then shifted; (B,) in (0,1). Normals are drawn on the
    generator's device, so that a seed gives the same timesteps on every device."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return logit_normal(normal, mean=mean, std=std, shift=shift).to(device)
