"""Tiny models and pipelines of Stable Diffusion 3, the U-Nets and SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from conftest import tiny_recipe
from torch import Tensor

from cases.case import Builder, Case
from cases.ddpm_parts import WIDTH, autoencoder, scheduler
from cases.parts import clip_encoder, clip_tokenizer
from davae.tasks.text_to_image import build_text_encoder


def run_sd3(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        pooled_projections=torch.randn(B, 8, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        return_dict=False,
    )[0]


def run_unet2d(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 300, dtype=torch.long),
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        return_dict=False,
    )[0]


def stable_diffusion(folder: Path) -> None:
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=CASES["UNet2DConditionModel"].build("UNet2DConditionModel", cross_attention_dim=WIDTH),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_xl(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    second = build_text_encoder(tiny_recipe().architecture, tokenizer).eval()
    unet = CASES["UNet2DConditionModel"].build(
        "UNet2DConditionModel",
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + second.config.projection_dim,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "SD3Transformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        run_sd3,
    ),
    "UNet2DConditionModel": Case(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 8],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        run_unet2d,
    ),
}
BUILDERS: dict[str, Builder] = {
    "UNet2DConditionModel": stable_diffusion,
}
VARIANTS: dict[str, Builder] = {
    "SDXL": stable_diffusion_xl,
}
