"""Tiny models and pipelines of HiDream-I1, PRX and AuraFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import tiny_autoencoder, tiny_recipe
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from cases.case import Builder, Case
from cases.flow_parts import LAYERS, WIDTH, gemma, save
from cases.parts import clip_tokenizer, word_tokenizer
from davae.tasks.text_to_image import build_text_encoder


def run_hi_dream_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        timesteps=torch.full((B,), 300.0, dtype=dt),
        encoder_hidden_states_t5=torch.randn(B, 3, 8, dtype=dt),
        encoder_hidden_states_llama3=torch.randn(2, B, 3, 8, dtype=dt),
        pooled_embeds=torch.randn(B, 8, dtype=dt),
        return_dict=False,
    )[0]


def run_prx(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        timestep=torch.full((B,), 0.3, dtype=dt),
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        attention_mask=torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


def run_aura_flow(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        return_dict=False,
    )[0]


def aura_flow(folder: Path) -> None:
    config = UMT5Config(vocab_size=64, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config).eval()
    save(
        folder,
        "AuraFlowTransformer2DModel",
        CASES["AuraFlowTransformer2DModel"],
        "AuraFlowPipeline",
        text_encoder=encoder,
        tokenizer=word_tokenizer(),
    )


def hidream(folder: Path) -> None:
    # the pipeline draws 128 x 128 latent positions, whatever it is asked for: few large tokens, and a factor of one
    tokenizer = clip_tokenizer(128)
    architecture = tiny_recipe().architecture.model_copy(update={"text_tokens": 128})
    clip = build_text_encoder(architecture, tokenizer)
    model = {
        "patch_size": 64,
        "text_emb_dim": 2 * clip.config.projection_dim,
        "max_resolution": [128, 128],
    }
    llama = LlamaForCausalLM(LlamaConfig(**LAYERS, attn_implementation="eager")).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    save(
        folder,
        "HiDreamImageTransformer2DModel",
        CASES["HiDreamImageTransformer2DModel"],
        "HiDreamImagePipeline",
        vae=tiny_autoencoder(levels=1, attention=False),
        model=model,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=word_tokenizer(),
        text_encoder_4=llama,
        tokenizer_4=word_tokenizer(),
    )


def prx(folder: Path) -> None:
    # a saved T5GemmaEncoder is read back at the published size whatever its config says, so a tiny one cannot be
    parts = {**gemma(), "tokenizer": word_tokenizer(model_max_length=16)}
    save(
        folder,
        "PRXTransformer2DModel",
        CASES["PRXTransformer2DModel"],
        "PRXPipeline",
        default_sample_size=256,
        **parts,
    )


CASES: dict[str, Case] = {
    "HiDreamImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": [4, 2, 2],
            "max_resolution": [16, 16],
            "llama_layers": [0, 1],
        },
        run_hi_dream_image,
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        run_prx,
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        run_aura_flow,
    ),
}
BUILDERS: dict[str, Builder] = {
    "AuraFlowTransformer2DModel": aura_flow,
    "HiDreamImageTransformer2DModel": hidream,
    "PRXTransformer2DModel": prx,
}
