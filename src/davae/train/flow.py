"""What base pretraining and stage 2 share: one noised batch of flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from davae.losses.flow_matching import interpolate, sample_timesteps, velocity_target
from davae.recipes.schema import FlowOptim
from davae.train.draws import Draws


@dataclass(frozen=True)
class FlowBatch:
    """x_t and its velocity target (B,c,h,w), t (B,) in (0,1), and the conditions, some dropped for guidance."""

    conditions: list[Any]
    t: Tensor
    x_t: Tensor
    target: Tensor


def noise_batch(latents: Tensor, conditions: list[Any], null: Any, settings: FlowOptim, draws: Draws) -> FlowBatch:
    """Draw condition dropout, timesteps and noise of each sample, in that order. `null` replaces what is dropped."""
    dropped = draws.uniform() < settings.caption_dropout
    drawn = [
        sample_timesteps(
            1, generator, mean=settings.timestep_mean, std=settings.timestep_std, shift=settings.timestep_shift
        )
        for generator in draws.samples
    ]
    t = torch.cat(drawn).to(latents.device)
    noise = draws.normal(*latents.shape[1:]).to(latents)
    return FlowBatch(
        conditions=[null if drop else value for value, drop in zip(conditions, dropped, strict=True)],
        t=t,
        x_t=interpolate(latents, noise, t),
        target=velocity_target(latents, noise),
    )
