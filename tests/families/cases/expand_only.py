"""Tiny models and pipelines of the transformers that can only be expanded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases.case import Case


def run_hunyuan_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 300.0, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


def run_kandinsky5(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    dt = x.dtype
    o = model(
        x.permute(0, 2, 3, 1)[:, None],
        torch.randn(B, 3, 8, dtype=dt),
        torch.full((B,), 300.0, dtype=dt),
        torch.randn(B, 8, dtype=dt),
        [torch.arange(1), torch.arange(H // 2), torch.arange(W // 2)],
        torch.arange(3),
        return_dict=False,
    )
    return o[:, 0].permute(0, 3, 1, 2)


def run_glm_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    dt = x.dtype
    L = (H // 2) * (W // 2)
    s = torch.full((B, 2), 64.0, dtype=dt)
    return model(
        x,
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, L, dtype=torch.long),
        torch.zeros(B, L, dtype=torch.bool),
        torch.full((B,), 300.0, dtype=dt),
        s,
        s * 0,
        return_dict=False,
    )[0]


def run_bria_fibo(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    dt = x.dtype
    hs = pipe._pack_latents_no_patch(x, B, C, H, W)
    ids = pipe._prepare_latent_image_ids(B, H, W, "cpu", dt)
    o = model(
        hidden_states=hs,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        text_encoder_layers=[torch.randn(B, 3, 8, dtype=dt) for _ in range(2)],
        timestep=torch.full((B,), 300.0, dtype=dt),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3, dtype=dt),
        return_dict=False,
    )[0]
    return pipe._unpack_latents_no_patch(o, H * 16, W * 16, 16)


def run_bria_fibo2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 0.3, dtype=dt),
        torch.randn(B, 2, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


CASES: dict[str, Case] = {
    "HunyuanImageTransformer2DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": [2, 2],
            "text_embed_dim": 8,
            "rope_axes_dim": [4, 4],
        },
        run_hunyuan_image,
    ),
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 4,
            "patch_size": [1, 2, 2],
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": [4, 2, 2],
        },
        run_kandinsky5,
        tolerance=1e-5,
    ),
    "GlmImageTransformer2DModel": Case(
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
            "prior_vq_quantizer_codebook_size": 8,
        },
        run_glm_image,
    ),
    "BriaFiboTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": [2, 2, 4],
            "text_encoder_dim": 8,
        },
        run_bria_fibo,
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": [0],
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 2,
            "gist_min_text_len": 1,
            "gist_max_text_len": 8,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 32, 32],
        },
        run_bria_fibo2,
    ),
}
