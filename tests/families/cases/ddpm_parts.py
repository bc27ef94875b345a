"""Autoencoder, text encoder and scheduler of models trained by DDPM."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from transformers import T5Config, T5EncoderModel

from cases.parts import clip_tokenizer

WIDTH = 16  # of every text encoder


def autoencoder(levels: int = 2) -> Any:
    """An AutoencoderKL as these families have it: quant convolutions, a scale, no shift."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    ).eval()


def t5_encoder() -> Any:
    config = T5Config(vocab_size=len(clip_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def scheduler() -> Any:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
