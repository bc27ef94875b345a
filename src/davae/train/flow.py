"""What base pretraining and stage 2 share: one noised batch of flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from davae.losses.flow_matching import interpolate, sample_timesteps, velocity_target
from davae.recipes.schema import FlowOptim


@dataclass(frozen=True)
class FlowBatch:
    """x_t and its velocity target (B,c,h,w), t (B,) in (0,1), and the captions, some dropped for guidance."""

    captions: list[str]
    t: Tensor
    x_t: Tensor
    target: Tensor


def noise_batch(latents: Tensor, captions: list[str], settings: FlowOptim, generator: torch.Generator) -> FlowBatch:
    """Draw caption dropout, timesteps and noise from `generator`, in that order."""
    dropped = torch.rand(len(latents), generator=generator) < settings.caption_dropout
    t = sample_timesteps(
        len(latents),
        generator,
        mean=settings.timestep_mean,
        std=settings.timestep_std,
        shift=settings.timestep_shift,
        device=latents.device,
    )
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return FlowBatch(
        captions=["" if drop else text for text, drop in zip(captions, dropped, strict=True)],
        t=t,
        x_t=interpolate(latents, noise, t),
        target=velocity_target(latents, noise),
    )
