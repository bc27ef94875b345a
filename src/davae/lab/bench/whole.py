"""`davae bench whole`: time of a whole image of a real model, part by part.

A model of billions of weights does not fit everywhere. So each part runs at its true width with random weights: text encoders
and transformers with a few blocks, their time scaled by layers or by FLOPs to all of them, autoencoders whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import expand_transformer
from davae.errors import ModelError
from davae.lab.bench.clock import machine, race
from davae.lab.bench.tokens import one_pass, random_transformer, shallow
from davae.plan.figures import check_resolution, token_plan
from davae.pretrained.placement import own_device
from davae.pretrained.shapes import BaseShapes
from davae.pretrained.text_encoders import TextEncoder
from davae.tasks.base_model import BaseModel
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import decode_latents

LAYERS = 2  # of a text encoder
DEPTHS = ("num_hidden_layers", "num_layers")  # config keys of text encoders


def text_seconds(encoder: TextEncoder, repeats: int, dtype: torch.dtype) -> float:
    """Seconds of one prompt through a text encoder, from a few of its layers.

    Raises:
        ModelError: a config that does not say how many layers there are.
    """
    key = next((key for key in DEPTHS if encoder.config.get(key)), None)
    if key is None:
        raise ModelError(
            f"{encoder.component}: none of {', '.join(DEPTHS)} is in the config of this {encoder.class_name}"
        )
    layers = int(encoder.config[key])
    few = min(LAYERS, layers)
    with torch.device(own_device()):
        model = replace(encoder, config={**encoder.config, key: few}).build()
    model = model.to(own_device(), dtype)
    ids = torch.ones(1, encoder.tokens, dtype=torch.long, device=own_device())
    with torch.no_grad():
        times = race({key: lambda: model(input_ids=ids)}, repeats)
    return times[key].median * layers / few


def transformer_seconds(
    shapes: BaseShapes,
    resolution: int,
    scale: int,
    detail_channels: int,
    blocks: int,
    batch: int,
    repeats: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Seconds of one pass of all blocks, native and upgraded, from a few."""
    native = random_transformer(shapes, blocks, dtype)
    models = {"native": native, "upgraded": expand_transformer(native, detail_channels)}
    channels = {"native": shapes.channels, "upgraded": shapes.channels + detail_channels}
    side = resolution // shapes.vae_factor
    sides = {"native": side, "upgraded": side // scale}
    times = race({name: one_pass(models[name], channels[name], sides[name], batch) for name in models}, repeats)
    few = replace(shapes, transformer_config=shallow(shapes.transformer_config, blocks))
    part, every = (token_plan(each, resolution, scale, detail_channels) for each in (few, shapes))
    return {
        "native": times["native"].median * every.native_flops / part.native_flops,
        "upgraded": times["upgraded"].median * every.upgraded_flops / part.upgraded_flops,
    }


def decoding_seconds(
    shapes: BaseShapes, resolution: int, scale: int, detail_channels: int, repeats: int, dtype: torch.dtype
) -> dict[str, float]:
    """Return the seconds of decoding one image, whole, by the base autoencoder and a DetailVAE."""
    torch.manual_seed(0)
    with torch.device(own_device()):
        base: Any = model_class(shapes.vae_class).from_config(shapes.vae_config).eval()
    detail: Any = DetailVAE.from_base(base, detail_channels, scale).eval()
    device = own_device()
    side = resolution // shapes.vae_factor
    latents = {
        "native": torch.randn(1, shapes.channels, side, side),
        "upgraded": torch.randn(1, shapes.channels + detail_channels, side // scale, side // scale),
    }
    latents = {name: latent.to(device, dtype) for name, latent in latents.items()}
    decoders = {"native": base.to(device, dtype), "upgraded": detail.to(device, dtype)}
    with torch.no_grad():
        times = race(
            {name: lambda name=name: decode_latents(decoders[name], latents[name]) for name in latents}, repeats
        )
    return {name: times[name].median for name in latents}


def bench_whole(
    model: str,
    *,
    resolution: int,
    scale: int,
    detail_channels: int | None,
    blocks: int,
    steps: int,
    guided: bool,
    repeats: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the seconds of each part of one image, native and upgraded, their sums and ratio.

    Args:
        model: a preset, folder or hub id; its weights are not read.
        detail_channels: D; C unless given.
        blocks: of the transformer that run.
        guided: two passes a step, with and without the prompt, in one batch.

    Raises:
        ModelError: an unsupported model, a size that does not divide into tokens, or an autoencoder of another signature.
    """
    base = BaseModel(model)
    shapes = base.shapes
    try:
        check_resolution(shapes, resolution, scale)
    except ValueError as error:
        raise ModelError(str(error)) from error
    detail, passes = detail_channels or shapes.channels, 2 if guided else 1
    encoders = base.text_encoders
    text = {encoder.component: passes * text_seconds(encoder, repeats, dtype) for encoder in encoders}
    one = transformer_seconds(shapes, resolution, scale, detail, blocks, passes, repeats, dtype)
    decoding = decoding_seconds(shapes, resolution, scale, detail, repeats, dtype)
    parts = {
        name: {"text": sum(text.values()), "transformer": steps * one[name], "decoding": decoding[name]}
        for name in one
    }
    sums = {name: sum(seconds.values()) for name, seconds in parts.items()}
    return {
        "model": model,
        "resolution": resolution,
        "detail_channels": detail,
        "blocks_run": blocks,
        "steps": steps,
        "guided": guided,
        "dtype": str(dtype).removeprefix("torch."),
        "text_encoders": text,
        "native_seconds": parts["native"],
        "upgraded_seconds": parts["upgraded"],
        "transformer_speedup": one["native"] / one["upgraded"],
        "whole_speedup": sums["native"] / sums["upgraded"],
        "machine": machine(),
    }
