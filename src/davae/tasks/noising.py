"""The base model's own objective, and the noised batch on which every task trains.

Here the base and the detail channels share one timestep; `davae.tasks.two_levels` gives each its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from davae.backbones.family import Family
from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.losses.ddpm import Diffusion, PredictionType, min_snr_weight
from davae.losses.detail_scale import detail_scale_weight
from davae.losses.flow_matching import FlowMatching, x0_ratio_weight
from davae.pretrained.placement import send
from davae.recipes.sections import FlowOptim
from davae.train.random import SampleRandom


class Objective(Protocol):
    """A way to noise latents, and the target that a model predicts from them."""

    @property
    def prediction(self) -> PredictionType: ...

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one timestep from each sample's generator, (B,), in the unit of the family's call."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B,c,h,w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target that the model predicts from x_t, (B,c,h,w)."""
        ...

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma), each (B,1,1,1), of x_t = alpha x_0 + sigma noise."""
        ...


def flow_matching(settings: FlowOptim) -> FlowMatching:
    """Return flow matching with the timesteps of a recipe's section."""
    return FlowMatching(settings.timestep_mean, settings.timestep_std, settings.timestep_shift)


def drop_conditions(conditions: list[Any], null: Any, chance: float, draws: SampleRandom) -> list[Any]:
    """Replace each condition by `null` with a given chance, for classifier-free guidance.

    One number is drawn for each sample, also where the chance is 0.
    """
    dropped = draws.uniform() < chance
    return [null if drop else value for value, drop in zip(conditions, dropped, strict=True)]


@dataclass(frozen=True)
class NoisedBatch:
    """Noised latents x_t (B,c,h,w), their timesteps t (B,), and the target (B,c,h,w).

    Attributes:
        clean: (B,) booleans, the samples whose base holds no noise; None for none.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    clean: Tensor | None = None


def noise_batch(objective: Objective, latents: Tensor, draws: SampleRandom) -> NoisedBatch:
    """Draw each sample's timestep, then its noise, and noise the latents (B,c,h,w)."""
    t = send(objective.draw(draws.samples), latents.device)
    noise = send(draws.normal(*latents.shape[1:]), latents.device).to(latents.dtype)
    return NoisedBatch(objective.noised(latents, noise, t), t, objective.target(latents, noise, t))


def error_weight(
    objective: Objective, t: Tensor, *, min_snr_gamma: float | None, x0_ratio_max: float | None
) -> Tensor | None:
    """Return the weight of each sample's squared errors, (B,1,1,1), None where they are equal.

    The recipe gives the gamma of `min_snr_weight`, or for flow matching the maximum of `x0_ratio_weight`, or neither.
    """
    if min_snr_gamma is not None:
        return min_snr_weight(*objective.levels(t), min_snr_gamma, objective.prediction)
    if x0_ratio_max is not None:
        return x0_ratio_weight(objective.levels(t)[1], x0_ratio_max)
    return None


def with_detail_scale(
    weight: Tensor | None, objective: Objective, t: Tensor, layout: LatentLayout, scale: float
) -> Tensor | None:
    """Return the error weight by group, (B,C+D,1,1), for a detail that is scaled.

    Args:
        weight: of each sample, (B,1,1,1), or None.
        scale: `stage2.detail_scale`, see `detail_scale_weight`; 1 returns `weight`.
    """
    if scale == 1.0:
        return weight
    alpha, sigma = objective.levels(t)
    shared = torch.ones_like(sigma) if weight is None else weight  # (B,1,1,1)
    detail = shared * detail_scale_weight(alpha, sigma, scale, objective.prediction)
    return layout.by_group(shared, detail)


def choose_objective(scheduler: Any, family: Family, model: str, flow: FlowMatching | None = None) -> Objective:
    """Return the objective that a base pipeline's own scheduler belongs to.

    Args:
        scheduler: a diffusers scheduler; None where the pipeline solves its flow's ODE itself (LightningDiT).
        family: of the base's transformer.
        model: its name, for messages.
        flow: what to return where the scheduler is one of flow matching.

    Raises:
        ModelError: a prediction or noise that stage 2 cannot train, or one with which this family is not called.
    """
    objective = _objective(scheduler, model, flow or FlowMatching())
    if objective.prediction not in family.objectives:
        raise ModelError(
            f"model {model}: its scheduler {type(scheduler).__name__} belongs to {objective.prediction}, a "
            f"{family.class_name} is trained by {' or '.join(family.objectives)}; "
            "put the scheduler that the model was trained with into its folder"
        )
    return objective


def _objective(scheduler: Any, model: str, flow: FlowMatching) -> Objective:
    if scheduler is None:
        return flow
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type")
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        return flow
    # noise levels that are no table: continuous ones (EDM), and flow sigmas under another prediction
    table = hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type") != "continuous"
    if kind not in ("epsilon", "v_prediction") or not table or config.get("use_flow_sigmas"):
        raise ModelError(
            f"model {model}: its scheduler {name} has prediction_type '{kind}'"
            f"{'' if table else ' on continuous noise levels'}, which davae cannot train; it trains flow matching, and "
            "epsilon and v_prediction on a table of alphas_cumprod"
        )
    return Diffusion(scheduler.alphas_cumprod, kind)
