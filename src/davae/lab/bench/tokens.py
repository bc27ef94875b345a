"""`davae bench tokens`: one transformer pass at true width, native against upgraded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import expand_transformer
from davae.backbones.families import family_of
from davae.backbones.lightning_dit import LightningDiT
from davae.lab.bench.clock import Spread, machine, race, ratio
from davae.lab.bench.helpers import helped, multiplies
from davae.plan.figures import token_plan
from davae.pretrained.placement import own_device
from davae.pretrained.shapes import BaseShapes

DEPTHS = ("num_layers", "num_single_layers", "depth")  # config keys that count blocks
LISTS = ("dual_attention_layers",)  # config keys that name blocks by number


def shallow(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """Return the config with about `blocks` blocks, each kind in its share and at least one.

    Args:
        config: of a transformer.
        blocks: of all kinds together.

    Raises:
        ValueError: a config without a number of blocks.
    """
    depths = {key: int(config[key]) for key in DEPTHS if config.get(key)}
    if not depths:
        raise ValueError(f"none of {', '.join(DEPTHS)} is in the config, so its blocks cannot be counted")
    share = min(1.0, blocks / sum(depths.values()))
    changes: dict[str, Any] = {key: max(1, round(value * share)) for key, value in depths.items()}
    for key in LISTS:
        if config.get(key):
            changes[key] = tuple(range(round(len(config[key]) * share)))
    return {**config, **changes}


def random_transformer(shapes: BaseShapes, blocks: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a transformer of true width with few blocks of random weights, in eval mode.

    Args:
        shapes: configs of the model.
        blocks: of all kinds together.
    """
    torch.manual_seed(0)
    config = {k: v for k, v in shallow(shapes.transformer_config, blocks).items() if not k.startswith("_")}
    with torch.device(own_device()):  # billions of weights are drawn where they will be
        model = model_class(shapes.transformer_class).from_config(config)
    return model.eval().to(own_device(), dtype)


def one_pass(transformer: nn.Module, channels: int, side: int, batch: int = 1) -> Callable[[], object]:
    """Return a forward pass on random latents (batch,c,side,side), each with a prompt or class.

    Args:
        channels, side: of the latents.
        batch: images in the pass; prompts have the usual length.
    """
    config: Any = transformer.config
    generator = torch.Generator().manual_seed(1)
    first = next(transformer.parameters())
    device, dtype = first.device, first.dtype
    x = torch.randn(batch, channels, side, side, generator=generator).to(device, dtype)
    t = torch.full((batch,), 0.5, device=device)
    if isinstance(transformer, LightningDiT):
        labels = torch.zeros(batch, dtype=torch.long, device=device)

        def by_class() -> object:
            with torch.no_grad(), transformer.at_grid(side):
                return transformer(x, t, labels)

        return by_class
    call = family_of(transformer).require_call()
    blank = call.blank(config)
    parts = tuple(torch.randn(batch, *part.shape[1:], generator=generator).to(device, dtype) for part in blank)

    def by_prompt() -> object:
        with torch.no_grad():
            return call.predict(transformer, config, x, t, parts)

    return by_prompt


def bench_tokens(
    shapes: BaseShapes,
    *,
    resolution: int,
    scale: int,
    detail_channels: int,
    blocks: int,
    repeats: int,
    batch: int = 1,
    helpers: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the seconds of one pass, native and upgraded, and the ratios of time and FLOPs.

    Args:
        shapes: configs of the model.
        blocks: of the true width, with random weights.
        batch: images in a pass; guidance makes two of each.
        helpers: measured on both too; `check_helpers(helpers, passes=1)` checks them.

    Raises:
        ValueError: the resolution does not divide into tokens.
    """
    few = replace(shapes, transformer_config=shallow(shapes.transformer_config, blocks))
    plan = token_plan(few, resolution, scale, detail_channels)
    native = random_transformer(shapes, blocks, dtype)
    upgraded = expand_transformer(native, detail_channels)
    side = resolution // shapes.vae_factor
    sides = {"native": side, "upgraded": side // scale}
    models = {"native": (native, shapes.channels), "upgraded": (upgraded, shapes.channels + detail_channels)}
    passes = {name: one_pass(*models[name], sides[name], batch) for name in models}
    times = race(passes, repeats)
    rows = {}
    for helper in helpers:
        with helped(native, helper), helped(upgraded, helper):
            rows[helper] = helper_figures(times, race(passes, repeats))
    speedup = ratio(times["native"], times["upgraded"])
    config: Any = native.config
    return {
        "transformer": shapes.transformer_class,
        "resolution": resolution,
        "scale": scale,
        "detail_channels": detail_channels,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": sum(int(config[key]) for key in DEPTHS if config.get(key)),
        "parameters": sum(p.numel() for p in native.parameters()),
        "native_tokens": plan.native_tokens,
        "upgraded_tokens": plan.upgraded_tokens,
        "native_seconds": times["native"].as_dict(),
        "upgraded_seconds": times["upgraded"].as_dict(),
        "speedup": speedup,
        "bound": plan.bound,
        "share_of_bound": speedup / plan.bound,
        "native_gflops_per_second": batch * plan.native_flops / times["native"].median / 1e9,
        "upgraded_gflops_per_second": batch * plan.upgraded_flops / times["upgraded"].median / 1e9,
        **({"helpers": rows} if rows else {}),
        "machine": machine(),
    }


def helper_figures(alone: Mapping[str, Spread], faster: Mapping[str, Spread]) -> dict[str, Any]:
    """Return seconds and speed-ups of a helper, and whether they multiply with the token saving.

    Args:
        alone, faster: seconds of `native` and `upgraded`, without the helper and with it.
    """
    return {
        **{f"{name}_seconds": faster[name].as_dict() for name in alone},
        **{f"{name}_speedup": ratio(alone[name], faster[name]) for name in alone},
        "upgraded_over_native": ratio(faster["native"], faster["upgraded"]),
        "multiplies": multiplies(alone, faster),
    }
