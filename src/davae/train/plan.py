"""What a run would do, worked out from configs on the meta device: shapes, tokens, parameters, FLOPs, memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from davae.models.calls import CALLS
from davae.models.detail_vae import DetailVAE
from davae.models.expand import expand_transformer, latent_channels
from davae.models.families import model_class, transformer_family
from davae.models.lightning_dit import LightningDiT
from davae.models.pipeline import BaseShapes
from davae.recipes.schema import Recipe
from davae.train.stage2 import choose_trainable
from davae.train.upgrade import base_objective, base_shapes, check_recipe


@dataclass(frozen=True)
class TokenPlan:
    """One square picture: what a native and an upgraded transformer have to do."""

    resolution: int
    native_tokens: int
    upgraded_tokens: int
    native_flops: float  # one transformer pass, text included
    upgraded_flops: float

    @property
    def bound(self) -> float:
        """Upper bound of the transformer's speed-up."""
        return self.native_flops / self.upgraded_flops

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "bound": self.bound}


def meta_transformer(shapes: BaseShapes) -> nn.Module:
    """The transformer's modules without weights."""
    with torch.device("meta"):
        return model_class(shapes.transformer_class).from_config(shapes.transformer_config)


def transformer_flops(transformer: nn.Module, side: int) -> float:
    """FLOPs of one pass on side x side latents and one prompt, counted by torch on the meta device."""
    config: Any = transformer.config
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x_t, t = torch.empty(1, latent_channels(transformer), side, side), torch.empty(1)
        call = CALLS[type(transformer).__name__]
        grid = transformer.at_grid(side) if isinstance(transformer, LightningDiT) else nullcontext()
        with grid:
            call.predict(transformer, config, x_t, t, call.blank(config))
    return float(counter.get_total_flops())


def token_plan(shapes: BaseShapes, resolution: int, scale: int) -> TokenPlan:
    """Native against upgraded at `resolution` pixels.

    Raises:
        ValueError: when the resolution does not divide into tokens.
    """
    step = shapes.vae_factor * shapes.patch_size * scale
    if resolution % step:
        raise ValueError(f"resolution {resolution} is not divisible by {step} (factor x patch x scale)")
    native = (resolution // (shapes.vae_factor * shapes.patch_size)) ** 2
    upgraded = native // scale**2
    transformer, side = meta_transformer(shapes), resolution // shapes.vae_factor
    flops = [transformer_flops(transformer, side), transformer_flops(transformer, side // scale)]
    return TokenPlan(resolution, native, upgraded, *flops)


H100_FLOPS = 0.4 * 989e12  # dense bf16 peak of an H100, at the share of it that training usually reaches


def vae_flops(vae: DetailVAE, resolution: int) -> float:
    """FLOPs of one picture, encoded and decoded, counted by torch on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae(torch.empty(1, 3, resolution, resolution, device="meta"))
    return float(counter.get_total_flops())


def gpu_days(recipe: Recipe) -> float:
    """H100-days of both stages at 40 % of its bf16 peak; a backward pass counts twice a forward one.

    Encoding the cache, losses' own networks, loading and evaluation come on top.
    """
    shapes = base_shapes(recipe)
    with torch.device("meta"):
        vae = DetailVAE(shapes.vae_class, shapes.vae_config, recipe.detail_channels, recipe.scale)
    each = (
        (recipe.stage1, vae_flops(vae, recipe.resolution)),
        (recipe.stage2, token_plan(shapes, recipe.resolution, recipe.scale).upgraded_flops),
    )
    total = sum(3 * flops * s.batch_size * s.accumulation * s.max_steps for s, flops in each)
    return total / H100_FLOPS / 86400


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def plan(recipe: Recipe) -> dict[str, Any]:
    """Figures of a dry run. Memory counts weights, gradients, Adam moments and EMA, not activations."""
    shapes = base_shapes(recipe)
    layout = check_recipe(recipe, shapes)
    with torch.device("meta"):
        vae = DetailVAE(shapes.vae_class, shapes.vae_config, recipe.detail_channels, recipe.scale)
    transformer = expand_transformer(meta_transformer(shapes), recipe.detail_channels)
    trained_vae = count(p for p in vae.parameters() if p.requires_grad)
    trained_dit = count(choose_trainable(transformer, recipe.stage2.lora))
    tokens = token_plan(shapes, recipe.resolution, recipe.scale)
    side = recipe.base.resolution // shapes.vae_factor
    copies = 4  # gradient, two Adam moments, EMA: float32
    return {
        "image": f"{recipe.resolution}x{recipe.resolution}, base {recipe.base.resolution}x{recipe.base.resolution}",
        "latents": f"z ({layout.base_channels},{side},{side}) + z_d ({layout.detail_channels},{side},{side})",
        "patch": f"{shapes.patch_size}, head {transformer_family(shapes.transformer_class).head_order}",
        "objective": base_objective(recipe, shapes).prediction,
        "tokens_upgraded": tokens.upgraded_tokens,
        "tokens_native": tokens.native_tokens,
        "transformer_gflops_upgraded": round(tokens.upgraded_flops / 1e9, 3),
        "transformer_gflops_native": round(tokens.native_flops / 1e9, 3),
        "speedup_bound": round(tokens.bound, 2),
        "stage1_trainable_parameters": trained_vae,
        "stage1_parameters": count(vae.parameters()),
        "stage1_state_gib": round((count(vae.parameters()) + copies * trained_vae) * 4 / 2**30, 3),
        "stage2_trainable_parameters": trained_dit,
        "stage2_parameters": count(transformer.parameters()),
        "stage2_state_gib": round((count(transformer.parameters()) + copies * trained_dit) * 4 / 2**30, 3),
    }
