"""Rectified flow: x_t = (1 - t) x_0 + t noise, velocity = noise - x_0, t = 1 is pure noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t on the straight path from data to noise.

    latents, noise (B,c,h,w), t (B,) in [0,1] -> (B,c,h,w).
    """
    t = t.reshape(-1, *[1] * (latents.ndim - 1))  # (B,1,1,1)
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return dx_t/dt = noise - x_0, (B,c,h,w)."""
    return noise - latents


def shift_timestep(t: Tensor, shift: float) -> Tensor:
    """Return shift*t / (1 + (shift-1)*t), SD3's resolution-dependent shift, where 1 is none."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor, *, mean: float, std: float, shift: float) -> Tensor:
    """Return t = sigmoid(mean + std * normal), then shifted, of any shape, in (0,1)."""
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
    """Draw logit-normal, shifted timesteps, (B,) in (0,1).

    Normals are drawn on the generator's own device, so that a seed gives the same timesteps on every device.
    """
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return logit_normal(normal, mean=mean, std=std, shift=shift).to(device)


@dataclass(frozen=True)
class FlowMatching:
    """Objective of rectified flow: predict noise - x_0 at logit-normal, shifted timesteps.

    Attributes:
        mean, std: of the normal before the sigmoid.
        shift: see `shift_timestep`.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    @property
    def prediction(self) -> Literal["flow"]:
        return "flow"

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one timestep from each sample's generator: (B,) in (0,1)."""
        normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])  # (B,)
        return logit_normal(normal, mean=self.mean, std=self.std, shift=self.shift)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B,c,h,w)."""
        return interpolate(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B,c,h,w), which is the same at every t."""
        return velocity_target(latents, noise)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t), each (B,1,1,1): the factors of x_0 and noise in x_t."""
        t = t.reshape(-1, 1, 1, 1)
        return 1 - t, t


def x0_ratio_weight(sigma: Tensor, maximum: float) -> Tensor:
    """Return the weight with which the authors' SD3 code multiplies a squared velocity error.

    That code multiplies the error of x_0 by min((1 - sigma)/sigma, maximum). Flow matching has
    x_sigma = (1 - sigma) x_0 + sigma noise and v = noise - x_0, so x_0 = x_sigma - sigma v. A velocity that is wrong by e
    puts x_0 wrong by sigma e, and

        min((1 - sigma)/sigma, maximum) (sigma e)^2 = min(sigma (1 - sigma), maximum sigma^2) e^2.

    `min_snr_weight` clips (1 - sigma)^2/sigma^2 instead: 0.04 against 0.16 here at sigma = 0.8 and a maximum of 5.

    Args:
        sigma: noise level in [0, 1], of any shape.
        maximum: positive; 5 in the authors' configuration.
    """
    return (sigma * (1 - sigma)).minimum(maximum * sigma.square())
