"""Short sampling with the model that is being trained, for the images of progress."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from davae.losses.ddpm import Diffusion
from davae.losses.flow_matching import FlowMatching, shift_timestep
from davae.tasks.conditioning import Conditioning
from davae.tasks.stage2 import Stage2Task


def guided(conditioning: Conditioning, guidance_scale: float) -> tuple[Conditioning, float]:
    """Return the conditioning and the scale of two-pass guidance that guide a model once.

    Where guidance is an input of the model it gets the scale there, and a second pass would guide again.
    """
    embedded = conditioning.guided_by(guidance_scale)
    return (conditioning, guidance_scale) if embedded is None else (embedded, 1.0)


def solve(
    conditioning: Any, task: Stage2Task, noise: Tensor, conditions: list[Any], steps: int, guidance_scale: float
) -> Tensor:
    """Return normalised latents (B,c,h,w) from noise. Collective: the wrapped model runs.

    Flow matching: Euler from t = 1 to 0 in equal steps of the shifted time, along two times where the base is ahead.
    Diffusion: DDIM (arXiv 2010.02502) on the base's own table of noise levels, whatever solver its pipeline draws with.
    """

    def predict(x: Tensor, time: Any) -> Tensor:
        two = isinstance(time, list)
        t = torch.tensor([time] * len(x), device=x.device) if two else torch.full((len(x),), time, device=x.device)
        prediction = conditioning.predict(task.modules["transformer"], x, t, conditions)
        if guidance_scale <= 1:  # as in the stock pipelines
            return prediction
        free = conditioning.predict(task.modules["transformer"], x, t, [conditioning.null] * len(x))
        return free + guidance_scale * (prediction - free)

    x = noise
    if isinstance(task.objective, Diffusion):
        solver = ddim(task.objective)
        solver.set_timesteps(steps)
        for now in solver.timesteps:
            x = solver.step(predict(x, int(now)), int(now), x, return_dict=False)[0]
        return x
    assert isinstance(task.objective, FlowMatching)
    if task.levels is not None:
        for now, following in itertools.pairwise(task.levels.times(steps).to(x.device)):
            base, detail = (following - now).view(2, 1, 1, 1, 1)
            x = x + task.layout.by_group(base, detail) * predict(x, now.tolist())
        return x
    times = shift_timestep(torch.linspace(1, 0, steps + 1), task.objective.shift).tolist()
    for now, following in itertools.pairwise(times):
        x = x + (following - now) * predict(x, now)
    return x


def ddim(objective: Diffusion) -> DDIMScheduler:
    """Return a solver on the objective's table, from its last timestep on."""
    alpha_bar = objective.alphas_cumprod.cpu().double()
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.numpy(),
        prediction_type=objective.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
