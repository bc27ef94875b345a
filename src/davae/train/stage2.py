"""Stage 2: the warm-started transformer (Sec. 3.2, Eq. 7-13)."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from davae.data.cache import CachedLatents, collate_latents
from davae.errors import RecipeError
from davae.latent import LatentLayout, over_grid
from davae.losses.clean_base import with_clean_base, without_base_error
from davae.losses.detail_warmup import detail_direction_loss, detail_weight, velocity_loss
from davae.models.expand import new_weight_masks
from davae.models.families import transformer_family
from davae.models.placement import send
from davae.recipes.sections import Lora, Stage2
from davae.train.conditioning import Conditioning, of_batch
from davae.train.draws import Draws
from davae.train.loop import Player
from davae.train.objectives import Objective, noise_batch
from davae.train.observe import Parts
from davae.train.sharding import like, local


def choose_trainable(transformer: nn.Module, lora: Lora | None) -> list[nn.Parameter]:
    """Mark what stage 2 trains: everything, or LoRA plus all of P, P', O, O'. Returns it in module order.

    An expanded transformer shares its tensors with the pretrained one; those that are trained get storage of their own.
    """
    family = transformer_family(type(transformer).__name__)
    if lora is None:
        transformer.requires_grad_(True)
        for name in family.fixed:
            transformer.get_parameter(name).requires_grad_(False)
    else:
        transformer.requires_grad_(False)
        extra = tuple(re.escape(end) for end in lora.extra_targets)
        for end, pattern in zip(lora.extra_targets, extra, strict=True):
            check_target(transformer, end, _lora_pattern(pattern))
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
            target_modules=_lora_pattern(*family.lora_targets, *extra),
        )
        inject_adapter_in_model(config, transformer)  # not add_adapter, which DiT and Hunyuan-DiT lack
        for path in (family.embedder, family.head):
            transformer.get_submodule(path).requires_grad_(True)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.clone()
    return trainable


def in_full_precision(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Move what is trained to float32 where the frozen base is held in half precision: small updates would round away."""
    for parameter in parameters:
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = parameter.data.float()
    return parameters


def _lora_pattern(*ends: str) -> str:
    """Return a regular expression of whole layer names with one of these ends."""
    return rf"(?:.*\.)?(?:{'|'.join(ends)})"


def check_target(transformer: nn.Module, end: str, pattern: str) -> None:
    """Raise RecipeError where no linear layer or convolution has a name with this end."""
    for name, layer in transformer.named_modules():
        if re.fullmatch(pattern, name) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            return
    raise RecipeError(
        f"stage2.lora.extra_targets: no layer of {type(transformer).__name__} has a name that ends in '{end}'; name linear "
        "layers, as norm1.linear"
    )


class NewWeightBoost:
    """A learning-rate multiplier for P' and O' alone, which share their tensors with P and O.

    Adam's update is proportional to the learning rate, so scaling the update of the new entries is the same.
    """

    def __init__(self, transformer: nn.Module, multiplier: float):
        self.transformer, self.masks, self.multiplier = transformer, new_weight_masks(transformer), multiplier
        self._before: list[Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._boost)

    def _parameters(self) -> list[Tensor]:
        """Looked up at every step: FSDP2 puts pieces in their place."""
        return [self.transformer.get_parameter(name).detach() for name in self.masks]

    def _remember(self, *_: Any) -> None:
        self._before = [local(parameter).clone() for parameter in self._parameters()]

    def _boost(self, *_: Any) -> None:
        for parameter, mask, before in zip(self._parameters(), self.masks.values(), self._before, strict=True):
            now = local(parameter)
            now += (self.multiplier - 1) * local(like(mask.to(now), parameter)) * (now - before)


class Stage2Task:
    """The base's own objective on cached z_hr, detail faded in by w(n)."""

    name = "stage2"

    def __init__(
        self,
        settings: Stage2,
        layout: LatentLayout,
        transformer: nn.Module,
        cache: CachedLatents,
        normalise: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        objective: Objective,
        device: torch.device,
    ):
        self.settings, self.layout, self.dataset, self.collate, self.device = (
            settings,
            layout,
            cache,
            collate_latents,
            device,
        )
        self.conditioning, self.objective = conditioning, objective
        # a model with guidance as its input is never called with an empty caption
        self.drops = not transformer.config.get("guidance_embeds")  # type: ignore[union-attr, operator]
        self.mean, self.std = (values.to(device, torch.float32) for values in normalise)
        self.transformer = transformer.to(device)
        parameters = in_full_precision(choose_trainable(transformer, settings.lora))
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.masks = new_weight_masks(transformer)
        self.head = transformer_family(type(transformer).__name__).head  # now: FSDP2 changes the class
        self.players = {
            "transformer": Player(transformer, [{"params": parameters}], lr=settings.lr, parts=self.parts)
        }
        self.modules: dict[str, nn.Module] = {"transformer": transformer}

    def parts(self) -> Parts:
        """P', O', LoRA and the rest, whose gradient norms are logged apart. P and P' share tensors: masks part them."""
        groups: Parts = {"P'": [], "O'": [], "lora": [], "rest": []}
        for name, parameter in self.transformer.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in self.masks:
                new = "O'" if name.startswith(f"{self.head}.") else "P'"
                groups[new].append((parameter, self.masks[name]))
                groups["rest"].append((parameter, 1 - self.masks[name]))
            else:
                groups["lora" if "lora_" in name else "rest"].append((parameter, None))
        return groups

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.new_weight_lr_multiplier != 1.0:
            NewWeightBoost(self.transformer, self.settings.new_weight_lr_multiplier).attach(optimizer)

    def active(self, step: int) -> list[str]:
        return ["transformer"]

    def loss(self, player: str, batch: Any, step: int, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        s = self.settings
        raw = send(batch["latents"], self.device)  # (B,C+D,h,w)
        latents = (raw - over_grid(self.mean, raw)) / over_grid(self.std, raw)
        conditions = batch["conditions"]
        if "text" in batch:
            conditions = of_batch(conditions, batch["text"])
        settings = s if self.drops else s.model_copy(update={"caption_dropout": 0.0})
        noisy = noise_batch(
            self.objective,
            latents,
            conditions,
            self.conditioning.null,
            settings,
            draws,
            s.min_snr_gamma,
            s.x0_ratio_max,
        )
        self.conditioning.draw(draws.batch)
        x_t, target = noisy.x_t, noisy.target
        chosen = None
        if s.clean_base > 0.0:  # drawn last: without it, every other draw stays the same
            chosen = send(draws.uniform() < s.clean_base, self.device)
            x_t = with_clean_base(x_t, latents, self.layout, chosen)
        prediction = self.conditioning.predict(self.modules["transformer"], x_t, noisy.t, noisy.conditions)
        if chosen is not None:
            target = without_base_error(target, prediction, self.layout, chosen)
        weight = detail_weight(step, s.warmup_steps)
        loss = velocity_loss(prediction, target, self.layout, weight, noisy.weight)
        total, direction = loss.total, {}
        if s.cosine_loss != "off":
            shared = weight if s.cosine_loss == "faded" else 1.0
            term = detail_direction_loss(prediction, target, self.layout, shared)
            total, direction = total + term, {"loss_direction": term.detach()}
        return total, {
            "loss": total.detach(),
            **direction,
            "loss_base": loss.base.detach(),
            "loss_detail": loss.detail.detach(),
            "detail_weight": weight,
        }
