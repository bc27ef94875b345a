"""Tiny models and pipelines of PixArt, Hunyuan-DiT and SANA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SCMScheduler
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor
from transformers import BertConfig, BertModel

from cases.case import Builder, Case
from cases.ddpm_parts import WIDTH, autoencoder, scheduler, t5_encoder
from cases.flow_parts import gemma, save, tiny_dc
from cases.parts import clip_tokenizer


def run_pix_art(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        encoder_attention_mask=torch.ones(B, 3, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def run_hunyuan(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    dt = x.dtype
    rot = get_2d_rotary_pos_embed(8, ((0, 0), (H // 2, W // 2)), (H // 2, W // 2), output_type="pt")
    return model(
        x,
        torch.full((B,), 300.0, dtype=dt),
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        text_embedding_mask=torch.ones(B, 3),
        encoder_hidden_states_t5=torch.randn(B, 4, 8, dtype=dt),
        text_embedding_mask_t5=torch.ones(B, 4),
        image_meta_size=torch.ones(B, 6, dtype=dt),
        style=torch.zeros(B, dtype=torch.long),
        image_rotary_emb=rot,
        return_dict=False,
    )[0]


def run_sana(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        encoder_attention_mask=torch.ones(B, 3, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        return_dict=False,
    )[0]


def sana(folder: Path) -> None:
    model = {"sample_size": 16, "interpolation_scale": 1}
    save(
        folder,
        "SanaTransformer2DModel",
        CASES["SanaTransformer2DModel"],
        "SanaPipeline",
        vae=tiny_dc(),
        model=model,
        **gemma(),
    )


def sana_sprint(folder: Path) -> None:
    model = {"sample_size": 32, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    save(
        folder,
        "SanaTransformer2DModel",
        CASES["SanaTransformer2DModel"],
        "SanaSprintPipeline",
        vae=tiny_dc(),
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
        model=model,
        **gemma(),
    )


def pixart(folder: Path, pipeline: str = "PixArtAlphaPipeline", sample_size: int = 32) -> None:
    # hidden size a multiple of 3, among which size and aspect ratio are split
    transformer = CASES["PixArtTransformer2DModel"].build(
        "PixArtTransformer2DModel",
        caption_channels=WIDTH,
        sample_size=sample_size,
        num_attention_heads=3,
        cross_attention_dim=12,
    )
    getattr(diffusers, pipeline)(
        tokenizer=clip_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=scheduler(),
    ).save_pretrained(folder)


def hunyuan_dit(folder: Path) -> None:
    transformer = CASES["HunyuanDiT2DModel"].build(
        "HunyuanDiT2DModel", cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, text_len=77, text_len_t5=256
    )
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    diffusers.HunyuanDiTPipeline(
        vae=autoencoder(levels=4),  # the stock pipeline has factor 8 in its code
        text_encoder=BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer,
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "PixArtTransformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 8,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 8,
            "norm_num_groups": 1,
        },
        run_pix_art,
    ),
    "HunyuanDiT2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "learn_sigma": True,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8,
            "text_len": 3,
            "text_len_t5": 4,
        },
        run_hunyuan,
    ),
    "SanaTransformer2DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
            "sample_size": 8,
            "patch_size": 1,
        },
        run_sana,
    ),
}
BUILDERS: dict[str, Builder] = {
    "SanaTransformer2DModel": sana,
    "PixArtTransformer2DModel": pixart,
    "HunyuanDiT2DModel": hunyuan_dit,
}
VARIANTS: dict[str, Builder] = {
    "PixArt-Sigma": partial(pixart, pipeline="PixArtSigmaPipeline"),
    "PixArt-alpha at 1024 pixels": partial(pixart, sample_size=128),
}
