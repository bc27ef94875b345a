"""Tiny models and pipelines of CogView3-Plus and CogView4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from conftest import tiny_autoencoder
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import GlmConfig, GlmModel

from cases.case import Builder, Case
from cases.ddpm_parts import WIDTH, autoencoder, t5_encoder
from cases.flow_parts import LAYERS, save
from cases.parts import clip_tokenizer, word_tokenizer


def run_cog_view4(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    s = torch.full((B, 2), 64.0, dtype=dt)
    return model(
        x,
        torch.randn(B, 3, 8, dtype=dt),
        torch.full((B,), 300.0, dtype=dt),
        s,
        s,
        torch.zeros(B, 2, dtype=dt),
        return_dict=False,
    )[0]


def run_cog_view3plus(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    s = torch.full((B, 2), 64.0, dtype=dt)
    return model(
        x,
        torch.randn(B, 3, 8, dtype=dt),
        torch.full((B,), 300.0, dtype=dt),
        s,
        s,
        torch.zeros(B, 2, dtype=dt),
        return_dict=False,
    )[0]


def cogview4(folder: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
    )
    save(
        folder,
        "CogView4Transformer2DModel",
        CASES["CogView4Transformer2DModel"],
        "CogView4Pipeline",
        vae=tiny_autoencoder(levels=4),
        scheduler=scheduler,
        text_encoder=GlmModel(GlmConfig(**LAYERS)).eval(),
        tokenizer=word_tokenizer(padding_side="left"),
    )


def cogview3(folder: Path) -> None:
    transformer = CASES["CogView3PlusTransformer2DModel"].build(
        "CogView3PlusTransformer2DModel", text_embed_dim=WIDTH
    )
    diffusers.CogView3PlusPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "CogView4Transformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": [16, 16],
        },
        run_cog_view4,
    ),
    "CogView3PlusTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        run_cog_view3plus,
    ),
}
BUILDERS: dict[str, Builder] = {
    "CogView4Transformer2DModel": cogview4,
    "CogView3PlusTransformer2DModel": cogview3,
}
