"""What base pretraining and stage 2 share: one noised batch of flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from davae.losses.flow_matching import interpolate, sample_timesteps, velocity_target
from davae.recipes.schema import FlowOptim


@dataclass(frozen=True)
class FlowBatch:
    """x_t and its velocity target (B,c,h,w), t (B,) in (0,1), and the conditions, some dropped for guidance."""

    conditions: list[Any]
    t: Tensor
    x_t: Tensor
    target: Tensor


def noise_batch(
    latents: Tensor, conditions: list[Any], null: Any, settings: FlowOptim, generator: torch.Generator
) -> FlowBatch:
    """Draw condition dropout, timesteps and noise from `generator`, in that order. `null` replaces what is dropped."""
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
        conditions=[null if drop else value for value, drop in zip(conditions, dropped, strict=True)],
        t=t,
        x_t=interpolate(latents, noise, t),
        target=velocity_target(latents, noise),
    )
