"""Tiny pipelines of transformers that see 2x2 positions packed into one token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import tiny_autoencoder, tiny_recipe
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from family_models import CASES

from davae.train.base_text import build_silent_t5, build_silent_tokenizer
from family_pipelines.parts import clip_encoder, clip_tokenizer


def flux(folder: Path) -> None:
    clip, t5 = clip_encoder(), build_silent_t5(tiny_recipe().architecture)
    transformer = CASES["FluxTransformer2DModel"].build(
        "FluxTransformer2DModel",
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=clip.config.hidden_size,
        guidance_embeds=True,
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_autoencoder(),
        text_encoder=clip,
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=build_silent_tokenizer(),
    ).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {"FluxTransformer2DModel": flux}
