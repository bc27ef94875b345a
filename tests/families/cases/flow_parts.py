"""Parts of flow-matching pipelines that take latents as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from conftest import tiny_autoencoder
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from transformers import Gemma2Config, Gemma2Model

from cases.case import Case
from cases.parts import word_tokenizer

WIDTH = 8  # of every text encoder: what the tiny transformers take


LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def tiny_dc() -> AutoencoderDC:
    """SANA's autoencoder at its own factor of 32."""
    widths = (4, 4, 4, 8, 8, 8)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    ).eval()


def save(
    folder: Path,
    name: str,
    case: Case,
    pipeline: str,
    *,
    vae: Any = None,
    scheduler: Any = None,
    model: Any = None,
    **parts: Any,
) -> None:
    """Write the pipeline of a tiny transformer; `model` changes the config of its case."""
    getattr(diffusers, pipeline)(
        transformer=case.build(name, **(model or {})),
        vae=vae or tiny_autoencoder(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    ).save_pretrained(folder)


def gemma() -> dict[str, Any]:
    return {"text_encoder": Gemma2Model(Gemma2Config(**LAYERS)).eval(), "tokenizer": word_tokenizer()}
