"""Tiny models and pipelines of Lumina, Z-Image and ERNIE-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import tiny_autoencoder
from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor
from transformers import Qwen3Model

from cases.case import Builder, Case
from cases.flow_parts import gemma, save
from cases.parts import chat_tokenizer, mistral3, packed_autoencoder, qwen3, shifting


def run_lumina2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 0.3, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.long),
        return_dict=False,
    )[0]


def run_lumina_next(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 0.3, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.long),
        get_2d_rotary_pos_embed_lumina(8, 16, 16, linear_factor=1.0, ntk_factor=1.0),
        cross_attention_kwargs={},
        return_dict=False,
    )[0]


def run_zimage(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    out = model(
        [v[:, None] for v in x],
        torch.full((B,), 0.3, dtype=dt),
        [torch.randn(3, 8, dtype=dt) for _ in range(B)],
        return_dict=False,
    )[0]
    return torch.stack([o[:, 0] for o in out])


def run_ernie_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    o = model(
        F.pixel_unshuffle(x, 2),
        torch.full((B,), 300.0, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.full((B,), 3, dtype=torch.long),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(o, 2)


def z_image(folder: Path) -> None:
    ZImagePipeline(
        transformer=CASES["ZImageTransformer2DModel"].build("ZImageTransformer2DModel", axes_lens=[1024, 64, 64]),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen3(Qwen3Model, 2),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def ernie(folder: Path) -> None:
    ErnieImagePipeline(
        transformer=CASES["ErnieImageTransformer2DModel"].build("ErnieImageTransformer2DModel"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=packed_autoencoder(),
        text_encoder=mistral3(2).model,
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def lumina2(folder: Path) -> None:
    # the shift that the stock pipeline takes from the channels matters with a dynamic scheduler only
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    # the text's positions: the system prompt alone has 40 words
    model = {"axes_lens": [300, 16, 16]}
    vae = tiny_autoencoder(levels=4)
    save(
        folder,
        "Lumina2Transformer2DModel",
        CASES["Lumina2Transformer2DModel"],
        "Lumina2Pipeline",
        vae=vae,
        scheduler=scheduler,
        model=model,
        **gemma(),
    )


def lumina_next(folder: Path) -> None:
    save(
        folder,
        "LuminaNextDiT2DModel",
        CASES["LuminaNextDiT2DModel"],
        "LuminaPipeline",
        vae=tiny_autoencoder(levels=4),
        **gemma(),
    )


CASES: dict[str, Case] = {
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": [4, 4, 4],
            "axes_lens": [16, 16, 16],
            "cap_feat_dim": 8,
        },
        run_lumina2,
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 8,
            "learn_sigma": True,
        },
        run_lumina_next,
    ),
    "ZImageTransformer2DModel": Case(
        {
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [4, 2, 2],
            "axes_lens": [128, 32, 32],
        },
        run_zimage,
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 8,
            "rope_axes_dim": [4, 2, 2],
        },
        run_ernie_image,
    ),
}
BUILDERS: dict[str, Builder] = {
    "ZImageTransformer2DModel": z_image,
    "ErnieImageTransformer2DModel": ernie,
    "Lumina2Transformer2DModel": lumina2,
    "LuminaNextDiT2DModel": lumina_next,
}
