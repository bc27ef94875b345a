"""Stage 2: training of the warm-started transformer (Sec. 3.2, Eq. 7-13)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.expand import new_weight_masks
from davae.backbones.families import family_of
from davae.backbones.trainable import choose_trainable, in_full_precision
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.latent import LatentLayout, LatentStatistics
from davae.losses.clean_base import mean_base_error, with_clean_base, without_base_error
from davae.losses.flow_matching import FlowMatching
from davae.losses.velocity import detail_direction_loss, detail_weight, velocity_loss
from davae.pretrained.placement import send
from davae.recipes.sections import Stage2
from davae.tasks.conditioning import Conditioning, of_batch
from davae.tasks.held_base import HeldBase
from davae.tasks.noising import (
    NoisedBatch,
    Objective,
    drop_conditions,
    error_weight,
    noise_batch,
    with_detail_scale,
)
from davae.tasks.two_levels import TwoLevels, error_weight_by_group
from davae.train.monitor import WeightGroups
from davae.train.random import SampleRandom
from davae.train.state_dict import like, local
from davae.train.task import Task, Trainable


class Stage2Task(Task[Stage2]):
    """Training by the base's own objective on cached z_hr, detail faded in by w(n) (Eq. 13)."""

    name = "stage2"

    def __init__(
        self,
        settings: Stage2,
        layout: LatentLayout,
        transformer: nn.Module,
        cache: CachedLatents,
        statistics: LatentStatistics,
        conditioning: Conditioning,
        objective: Objective,
        device: torch.device,
        held: HeldBase | None = None,
    ):
        self.settings, self.layout, self.device, self.held = settings, layout, device, held
        self.dataset, self.collate = cache, collate_latents
        self.conditioning, self.objective = conditioning, objective
        self.levels: TwoLevels | None = None  # where the base is ahead of the detail
        if settings.detail_offset:
            assert isinstance(objective, FlowMatching)  # `check_timesteps` has seen to it
            self.levels = TwoLevels(layout, objective, settings.detail_offset_range, settings.detail_offset)
        # a model with guidance as its input is never called with an empty caption
        embedded = transformer.config.get("guidance_embeds")  # type: ignore[union-attr, operator]
        self.dropout = 0.0 if embedded else settings.caption_dropout
        self.statistics = statistics.to(device, torch.float32)
        self.transformer = transformer.to(device)
        parameters = in_full_precision(choose_trainable(transformer, settings.lora))
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.masks = new_weight_masks(transformer)
        self.head = family_of(transformer).head  # now: FSDP2 changes the class
        self.trainables = {
            "transformer": Trainable(transformer, [{"params": parameters}], lr=settings.lr, parts=self.parts)
        }
        self.modules: dict[str, nn.Module] = {"transformer": transformer}

    def parts(self) -> WeightGroups:
        """Return P', O', LoRA and the rest. Masks part P from P', which share a tensor."""
        groups: WeightGroups = {"P'": [], "O'": [], "lora": [], "rest": []}
        for name, parameter in self.transformer.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in self.masks:
                groups["O'" if name.startswith(f"{self.head}.") else "P'"].append((parameter, self.masks[name]))
                groups["rest"].append((parameter, 1 - self.masks[name]))
            else:
                groups["lora" if "lora_" in name else "rest"].append((parameter, None))
        return groups

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.new_weight_lr_multiplier != 1.0:
            NewWeightBoost(self.transformer, self.settings.new_weight_lr_multiplier).attach(optimizer)

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        s, layout = self.settings, self.layout
        latents = self.statistics.normalise(send(batch["latents"], self.device))  # (B,C+D,h,w)
        prompts = of_batch(batch["conditions"], batch["text"]) if "text" in batch else batch["conditions"]
        conditions = drop_conditions(prompts, self.conditioning.null, self.dropout, draws)
        noised = self.noise(latents, draws)
        self.conditioning.draw(draws.batch)
        noised = self.keep_clean_base(noised, latents, draws)
        target = noised.target if self.held is None else self.held.target(noised, self.conditioning, conditions)
        prediction = self.conditioning.predict(self.modules["transformer"], noised.x_t, noised.t, conditions)
        if noised.clean is not None:
            target = without_base_error(target, prediction, layout, noised.clean)
        weights = self.error_weights(noised.t)
        weight = detail_weight(step, s.warmup_steps)  # w(n), Eq. 12
        loss = velocity_loss(prediction, target, layout, weight, weights)  # Eq. 13
        total, direction = loss.total, {}
        if s.cosine_loss != "off":
            shared = weight if s.cosine_loss == "faded" else 1.0
            term = detail_direction_loss(prediction, target, layout, shared, noised.clean)
            total, direction = total + term, {"loss_direction": term.detach()}
        return total, {
            "loss": total.detach(),
            **direction,
            "loss_base": mean_base_error(loss.base.detach(), noised.clean),
            "loss_detail": loss.detail.detach(),
            "detail_weight": weight,
        }

    def noise(self, latents: Tensor, draws: SampleRandom) -> NoisedBatch:
        """Draw timesteps and noise, and noise the latents (B,C+D,h,w), by the recipe at two levels."""
        if self.levels is not None:
            return self.levels.noise(latents, draws)
        return noise_batch(self.objective, latents, draws)

    def keep_clean_base(self, noised: NoisedBatch, latents: Tensor, draws: SampleRandom) -> NoisedBatch:
        """Draw the samples that keep a clean base, by the recipe, and put it in place.

        Called after every other draw of the step, which are therefore the same with and without it.
        """
        if self.settings.clean_base == 0.0:
            return noised
        clean = send(draws.uniform() < self.settings.clean_base, self.device)
        x_t = with_clean_base(noised.x_t, latents, self.layout, clean)
        if self.levels is None or noised.clean is None:
            return replace(noised, x_t=x_t, clean=clean)
        return replace(noised, x_t=x_t, t=self.levels.with_clean_base(noised.t, clean), clean=noised.clean | clean)

    def error_weights(self, t: Tensor) -> Tensor | None:
        """Return the weights of squared errors at timesteps (B,), or at levels (B,2)."""
        s = self.settings
        ratios = {"min_snr_gamma": s.min_snr_gamma, "x0_ratio_max": s.x0_ratio_max}
        if self.levels is not None:
            return error_weight_by_group(self.objective, t, self.layout, **ratios)
        return with_detail_scale(
            error_weight(self.objective, t, **ratios), self.objective, t, self.layout, s.detail_scale
        )


class NewWeightBoost:
    """Learning-rate multiplier of P' and O' alone, which share their tensors with P and O.

    Adam's update is proportional to the learning rate, so scaling the update of the new entries is the same.
    """

    def __init__(self, transformer: nn.Module, multiplier: float):
        self.transformer, self.masks, self.multiplier = transformer, new_weight_masks(transformer), multiplier
        self._before: list[Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._boost)

    def _parameters(self) -> list[Tensor]:
        # looked up at every step: FSDP2 puts pieces in their place
        return [self.transformer.get_parameter(name).detach() for name in self.masks]

    def _remember(self, *_: Any) -> None:
        self._before = [local(parameter).clone() for parameter in self._parameters()]

    def _boost(self, *_: Any) -> None:
        for parameter, mask, before in zip(self._parameters(), self.masks.values(), self._before, strict=True):
            now = local(parameter)
            now += (self.multiplier - 1) * local(like(mask.to(now), parameter)) * (now - before)
