"""Noise levels of a scheduler's states, and the clean latents behind them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from davae.errors import ModelError

NOISELESS = (  # first-order steps and their multistep refinements: no noise is added
    "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """Weights of data and noise in a state: x = data * z + noise * n."""

    data: float
    noise: float

    def state(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return the known data z at this level: x = a z + s n.

        With one fixed n, these states of all levels are the exact path of a deterministic sampler that predicts z at every
        step: in flow matching the straight line x = (1 - sigma) z + sigma n with velocity n - z, in DDPM the path of DDIM
        and of all exponential integrators (x_0 = z and epsilon = n are constant along it).
        """
        return self.data * z + self.noise * noise

    @property
    def share(self) -> float:
        """Return the share of noise s / (a + s), sigma of flow matching, in [0,1]."""
        return self.noise / (self.data + self.noise)

    def clean(self, z: Tensor) -> Tensor:
        """Return the state whose data a model sees as z itself, without noise.

        Schedulers of x = z + sigma n divide what the model sees by sqrt(1 + sigma^2); all others leave it as it is.
        """
        return z * (1.0 + self.noise**2) ** 0.5 if self.data == 1.0 else z


def level_after(pipeline: Any, calls: int, *, detail: bool = False) -> Level:
    """Return the level of a pipeline's latents after `calls` steps of the drawing that runs.

    Args:
        pipeline: with a scheduler whose timesteps are set, or davae's ClassConditionalPipeline without one.
        calls: steps made; 0 is the start.
        detail: the level of the detail channels, where the model gives these a time of their own.

    Raises:
        ModelError: a scheduler of a kind whose levels are not known.
    """
    scheduler = pipeline.scheduler
    if scheduler is None:  # t runs from 0, noise, to 1
        t = float((pipeline.detail_times if detail else pipeline.times)[calls])
        return Level(t, 1.0 - t)
    steps = len(scheduler.timesteps)
    if calls >= steps:
        return Level(1.0, 0.0)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (steps, steps + 1):
        sigma = float(sigmas[calls])
        if is_flow(scheduler):
            return Level(1.0 - sigma, sigma)
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, noise = scheduler._sigma_to_alpha_sigma_t(torch.as_tensor(sigma, dtype=torch.float64))
            return Level(float(alpha), float(noise))
        return Level(1.0, sigma)
    if hasattr(scheduler, "alphas_cumprod"):
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[calls])])
        return Level(alpha**0.5, (1.0 - alpha) ** 0.5)
    raise ModelError(f"scheduler {type(scheduler).__name__}: its noise levels are not known; use the family's own")


def first_step(scheduler: Any, timestep: Any) -> int:
    """Return the steps that a drawing left out before its first one, which has just been made."""
    if (index := getattr(scheduler, "step_index", None)) is not None:
        return index - 1
    timesteps = [] if scheduler is None else scheduler.timesteps.tolist()
    return next((place for place, one in enumerate(timesteps) if one == timestep), 0)


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler's states are x = (1 - sigma) z + sigma n."""
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def adds_noise(scheduler: Any) -> bool:
    """Return whether a scheduler may add noise at its steps."""
    config = scheduler.config
    algorithm = str(config.get("algorithm_type") or "")
    stochastic = bool(config.get("stochastic_sampling")) or algorithm.startswith("sde")
    return type(scheduler).__name__ not in NOISELESS or stochastic


def takes_generator(scheduler: Any) -> bool:
    """Return whether a scheduler's step takes a generator of the noise that it adds."""
    return "generator" in inspect.signature(scheduler.step).parameters


def clean_from(before: Tensor, after: Tensor, start: Level, end: Level) -> Tensor:
    """Return the clean latents that a step without added noise moved towards.

    Both states hold the same data and noise, x = a z + s n and x' = a' z + s' n, so z = (s' x - s x') / (a s' - a' s).

    Args:
        before, after: states x and x' of the same shape.
        start, end: their levels.
    """
    return (end.noise * before - start.noise * after) / (start.data * end.noise - end.data * start.noise)


def clean_of(pipeline: Any, latents: Tensor, calls: int, before: Tensor | None) -> Tensor:
    """Return the best estimate of the clean latents after a step that costs no pass.

    Args:
        latents: the state after `calls` steps, in the pipeline's shape.
        before: the state one step earlier, where it is known.

    Returns:
        The prediction that a solver keeps, else what the last two states point to, else the state divided by its weight of
        data, which still shows its noise.
    """
    scheduler, level = pipeline.scheduler, level_after(pipeline, calls)
    if scheduler is not None:
        kept = [one for one in getattr(scheduler, "model_outputs", None) or () if torch.is_tensor(one)]
        predicts = str(scheduler.config.get("algorithm_type") or "").endswith("dpmsolver++")
        if kept and (predicts or scheduler.config.get("predict_x0")) and kept[-1].shape == latents.shape:
            return kept[-1]
    if level.noise == 0.0:
        return latents / level.data
    start = level_after(pipeline, calls - 1)
    moved = abs(start.data * level.noise - level.data * start.noise) > 1e-6
    if before is not None and moved and (scheduler is None or not adds_noise(scheduler)):
        return clean_from(before.float(), latents.float(), start, level)
    return latents / max(level.data, 0.1)
