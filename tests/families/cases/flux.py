"""Tiny models and pipelines of FLUX.1 and its relatives, and FLUX.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import tiny_autoencoder, tiny_recipe
from diffusers import (
    BriaPipeline,
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    LongCatImagePipeline,
    OvisImagePipeline,
)
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from torch import Tensor
from transformers import Qwen3ForCausalLM, Qwen3Model

from cases.case import Builder, Case
from cases.parts import (
    chat_tokenizer,
    clip_encoder,
    clip_tokenizer,
    mistral3,
    packed_autoencoder,
    qwen2_vl,
    qwen3,
    shifting,
    t5_encoder,
    t5_tokenizer,
)
from davae.tasks.text_to_image import build_silent_t5, build_silent_tokenizer


def run_flux(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    ids = pipe._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", dt)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        pooled_projections=torch.randn(B, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 8)


def run_flux2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    lat = pipe._patchify_latents(x)
    ids = pipe._prepare_latent_ids(lat)
    hs = pipe._pack_latents(lat)
    txt = torch.randn(B, 3, 8, dtype=dt)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=txt,
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_ids=ids,
        txt_ids=pipe._prepare_text_ids(txt),
        guidance=None,
        return_dict=False,
    )[0]
    return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(o, ids))


def run_chroma(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    ids = pipe._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", dt)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 8)


def run_ovis_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    ids = pipe._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", dt)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 8)


def run_long_cat_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    ids = prepare_pos_ids(1, "image", (4, 4), height=H // 2, width=W // 2)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 8)


def run_bria(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    ids = pipe._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", dt)[0]
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 16)


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


def flux2(folder: Path) -> None:
    Flux2Pipeline(
        transformer=CASES["Flux2Transformer2DModel"].build(
            "Flux2Transformer2DModel", joint_attention_dim=24, guidance_embeds=True
        ),
        scheduler=shifting(),
        vae=packed_autoencoder(),
        text_encoder=mistral3(30),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def flux2_klein(folder: Path) -> None:
    Flux2KleinPipeline(
        transformer=CASES["Flux2Transformer2DModel"].build(
            "Flux2Transformer2DModel", joint_attention_dim=24, guidance_embeds=False
        ),
        scheduler=shifting(),
        vae=packed_autoencoder(),
        text_encoder=qwen3(Qwen3ForCausalLM, 27),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def chroma(folder: Path) -> None:
    ChromaPipeline(
        transformer=CASES["ChromaTransformer2DModel"].build("ChromaTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


def ovis(folder: Path) -> None:
    OvisImagePipeline(
        transformer=CASES["OvisImageTransformer2DModel"].build("OvisImageTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen3(Qwen3Model, 1),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def long_cat(folder: Path) -> None:
    LongCatImagePipeline(
        transformer=CASES["LongCatImageTransformer2DModel"].build("LongCatImageTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen2_vl(),
        tokenizer=chat_tokenizer(),
        text_processor=chat_tokenizer(),
    ).save_pretrained(folder)


def bria(folder: Path) -> None:
    BriaPipeline(
        transformer=CASES["BriaTransformer2DModel"].build("BriaTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "pooled_projection_dim": 8,
        },
        run_flux,
    ),
    "Flux2Transformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_guidance_channels": 8,
            "mlp_ratio": 2.0,
            "axes_dims_rope": [2, 2, 2, 2],
            "guidance_embeds": False,
        },
        run_flux2,
    ),
    "ChromaTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        run_chroma,
    ),
    "OvisImageTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "out_channels": 16,
        },
        run_ovis_image,
    ),
    "LongCatImageTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "pooled_projection_dim": 8,
        },
        run_long_cat_image,
    ),
    "BriaTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
        },
        run_bria,
    ),
}
BUILDERS: dict[str, Builder] = {
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "Flux2Transformer2DModel (Klein)": flux2_klein,
    "ChromaTransformer2DModel": chroma,
    "OvisImageTransformer2DModel": ovis,
    "LongCatImageTransformer2DModel": long_cat,
    "BriaTransformer2DModel": bria,
}
