"""What a base model was trained to predict, and from which noise: flow matching, epsilon or v under its own scheduler.

Base pretraining and stage 2 draw one noised batch here. Both groups of channels share its timestep; whoever gives them
different ones changes `noise_batch`, which alone knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from davae.backbones.families.rows import TransformerFamily
from davae.errors import ModelError, RecipeError
from davae.losses import ddpm
from davae.losses.flow_matching import interpolate, logit_normal, velocity_target
from davae.losses.min_snr import Prediction, min_snr_weight
from davae.losses.x0_ratio import x0_ratio_weight
from davae.pretrained.placement import send
from davae.recipes.sections import FlowOptim, Stage2
from davae.train.random import SampleRandom


class Objective(Protocol):
    """A way to noise latents, and what is predicted from them."""

    @property
    def prediction(self) -> Prediction: ...

    def draw(self, settings: FlowOptim, generators: list[torch.Generator]) -> Tensor:
        """A timestep for each sample's generator (B,), as the family's call takes it."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B,c,h,w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should say of x_t, (B,c,h,w)."""
        ...

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each (B,1,1,1), of x_t = alpha x_0 + sigma noise."""
        ...


class FlowMatching:
    """Rectified flow: t in (0,1), logit-normal and shifted as the recipe says; the target is noise - data."""

    prediction: Literal["flow"] = "flow"

    def draw(self, settings: FlowOptim, generators: list[torch.Generator]) -> Tensor:
        normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])  # (B,)
        return logit_normal(
            normal, mean=settings.timestep_mean, std=settings.timestep_std, shift=settings.timestep_shift
        )

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return velocity_target(latents, noise)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(-1, 1, 1, 1)
        return 1 - t, t


@dataclass(frozen=True)
class Diffusion:
    """DDPM: integer t, uniform over the scheduler's training steps; the target is the noise, or v.

    A model that also returns a variance is trained on its mean alone: the stock pipelines drop the variance before the
    scheduler's step, so nobody would see what its variational bound taught. The new rows of that half stay zero, which is the
    middle of the range that a learned variance is interpolated in.
    """

    alphas_cumprod: Tensor  # (T,)
    prediction: Literal["epsilon", "v_prediction"]

    def draw(self, settings: FlowOptim, generators: list[torch.Generator]) -> Tensor:
        steps = len(self.alphas_cumprod)
        return torch.cat([ddpm.draw_timesteps(1, steps, generator, generator.device) for generator in generators])

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return ddpm.add_noise(latents, noise, self.alphas_cumprod, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        return ddpm.v_target(latents, noise, self.alphas_cumprod, t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(len(t), 1, 1, 1, device=t.device)
        return ddpm.signal_and_noise(self.alphas_cumprod, t, like)


FLOW = FlowMatching()


@dataclass(frozen=True)
class NoisedBatch:
    """x_t and the target (B,c,h,w), t (B,), and the conditions, some dropped for guidance.

    `weight` multiplies the squared errors, (B,1,1,1): min-SNR, or None for one and all.
    """

    conditions: list[Any]
    t: Tensor
    x_t: Tensor
    target: Tensor
    weight: Tensor | None


def noise_batch(
    objective: Objective,
    latents: Tensor,
    conditions: list[Any],
    null: Any,
    settings: FlowOptim,
    draws: SampleRandom,
    min_snr_gamma: float | None = None,
    x0_ratio_max: float | None = None,
) -> NoisedBatch:
    """Draw condition dropout, timestep and noise of each sample, in that order. `null` replaces what is dropped.

    Args:
        min_snr_gamma, x0_ratio_max: the loss weights of `min_snr_weight` and, for flow matching, of `x0_ratio_weight`; one at
            most.
    """
    dropped = draws.uniform() < settings.caption_dropout
    t = send(objective.draw(settings, draws.samples), latents.device)
    noise = send(draws.normal(*latents.shape[1:]), latents.device).to(latents.dtype)
    weight = None
    if min_snr_gamma is not None:
        weight = min_snr_weight(*objective.levels(t), min_snr_gamma, objective.prediction)
    elif x0_ratio_max is not None:
        weight = x0_ratio_weight(objective.levels(t)[1], x0_ratio_max)
    return NoisedBatch(
        conditions=[null if drop else value for value, drop in zip(conditions, dropped, strict=True)],
        t=t,
        x_t=objective.noised(latents, noise, t),
        target=objective.target(latents, noise, t),
        weight=weight,
    )


def choose_objective(scheduler: Any, family: TransformerFamily, model: str) -> Objective:
    """The objective that a base pipeline's own scheduler stands for.

    Args:
        scheduler: a diffusers scheduler; None where the pipeline solves its flow's ODE itself (LightningDiT).
        model: its name, for messages.

    Raises:
        ModelError: a prediction or noise that stage 2 cannot train, or one that this family is not called with.
    """
    objective = _objective(scheduler, model)
    if objective.prediction not in family.objectives:
        raise ModelError(
            f"model {model}: its scheduler {type(scheduler).__name__} stands for {objective.prediction}, a "
            f"{family.class_name} is trained by {' or '.join(family.objectives)}; "
            "put the scheduler that the model was trained with into its folder"
        )
    return objective


def _objective(scheduler: Any, model: str) -> Objective:
    if scheduler is None:
        return FLOW
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type")
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        return FLOW
    # noise levels that are no table: continuous ones (EDM), and flow sigmas under another prediction
    table = hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type") != "continuous"
    if kind not in ("epsilon", "v_prediction") or not table or config.get("use_flow_sigmas"):
        raise ModelError(
            f"model {model}: its scheduler {name} has prediction_type '{kind}'"
            f"{'' if table else ' on continuous noise levels'}, which davae cannot train; it trains flow matching, and "
            "epsilon and v_prediction on a table of alphas_cumprod"
        )
    return Diffusion(scheduler.alphas_cumprod, kind)


def check_timesteps(settings: FlowOptim, objective: Objective) -> None:
    """Raise RecipeError when a recipe asks for timesteps or weights of flow matching for a model of another objective."""
    if objective.prediction != "flow" and isinstance(settings, Stage2) and settings.x0_ratio_max is not None:
        raise RecipeError(
            f"stage2.x0_ratio_max: weighs flow matching; this model's scheduler has {objective.prediction}; use min_snr_gamma"
        )
    for name in ("timestep_mean", "timestep_std", "timestep_shift"):
        default = FlowOptim.model_fields[name].default
        if objective.prediction != "flow" and getattr(settings, name) != default:
            raise RecipeError(
                f"stage2.{name}: belongs to flow matching; this model's scheduler stands for {objective.prediction}, whose "
                f"timesteps are uniform. Leave it out"
            )
