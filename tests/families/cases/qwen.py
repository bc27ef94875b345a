"""Tiny models and pipelines of Qwen-Image, Nucleus-Image and Krea 2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    Krea2Pipeline,
    NucleusMoEImagePipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
)
from torch import Tensor

from cases.case import Builder, Case
from cases.parts import VIDEO, chat_tokenizer, lively, qwen2_vl, qwen3_vl, shifting, vision_processor


def run_qwen_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        encoder_hidden_states_mask=None,
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_shapes=[[(1, H // 2, W // 2)]] * B,
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 8)[:, :, 0]


def run_qwen_image21(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    L = H * W
    hs = pipe._pack_latents(x, B, C, H, W)
    mask = torch.cat([torch.zeros(B, 3, dtype=torch.bool), torch.ones(B, L // 4, dtype=torch.bool)], 1)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        img_shapes=[[(1, H, W)]] * B,
        img_mask=mask,
        return_dict=False,
    )[0][:, -L:]
    return o.transpose(1, 2).reshape(B, -1, H, W)


def run_nucleus_mo_eimage(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents(x, B, C, H, W, 2)
    o = model(
        hidden_states=hs,
        img_shapes=[(1, H // 2, W // 2)] * B,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        encoder_hidden_states_mask=None,
        timestep=torch.full((B,), 0.3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(o, H * 8, W * 8, 2, 8)[:, :, 0]


def run_krea2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    s = SimpleNamespace(patch_size=2, vae_scale_factor=8)
    hs = pipe._pack_latents(s, x, B, C, H, W)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 2, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        position_ids=pipe.prepare_position_ids(3, H // 2, W // 2, "cpu"),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(s, o, H * 8, W * 8)[:, :, 0]


def qwen_image(folder: Path) -> None:
    QwenImagePipeline(
        transformer=CASES["QwenImageTransformer2DModel"].build("QwenImageTransformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen2_vl(),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def qwen_image21(folder: Path) -> None:
    QwenImage21Pipeline(
        transformer=CASES["QwenImage21Transformer2DModel"].build("QwenImage21Transformer2DModel"),
        scheduler=shifting(),
        # the pipeline has 16 pixels per position in its code
        vae=lively(
            AutoencoderKLQwenImage21(
                **{**VIDEO, "dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [True, False, False, False]},
                decoder_base_dim=8,
            )
        ),
        text_encoder=qwen3_vl(),
        processor=vision_processor(),
    ).save_pretrained(folder)


def krea2(folder: Path) -> None:
    Krea2Pipeline(
        transformer=CASES["Krea2Transformer2DModel"].build("Krea2Transformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen3_vl().model,
        tokenizer=chat_tokenizer(),
        text_encoder_select_layers=(0, 1),
    ).save_pretrained(folder)


def nucleus(folder: Path) -> None:
    NucleusMoEImagePipeline(
        transformer=CASES["NucleusMoEImageTransformer2DModel"].build("NucleusMoEImageTransformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen3_vl(layers=8),  # the pipeline reads the eighth from the end
        processor=vision_processor(),
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "QwenImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
        },
        run_qwen_image,
    ),
    "QwenImage21Transformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "context_in_dim": 8,
            "mlp_ratio": 2,
            "axes_dims_rope": [2, 2, 4],
        },
        run_qwen_image21,
        tolerance=1e-4,
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "mlp_ratio": 2.0,
            "moe_enabled": False,
        },
        run_nucleus_mo_eimage,
    ),
    "Krea2Transformer2DModel": Case(
        {
            "in_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": [4, 2, 2],
        },
        run_krea2,
        tolerance=1e-5,
    ),
}
BUILDERS: dict[str, Builder] = {
    "QwenImageTransformer2DModel": qwen_image,
    "QwenImage21Transformer2DModel": qwen_image21,
    "Krea2Transformer2DModel": krea2,
    "NucleusMoEImageTransformer2DModel": nucleus,
}
