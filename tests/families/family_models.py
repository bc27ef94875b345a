"""Tiny models of every family's real class, and one forward pass of each: latents (B,C,H,W) in, (B,c,H,W) out.

`x` are latents with any number of channels; packing and unpacking are the stock pipelines' own (`pipe`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from torch import Tensor

from davae.backbones.families import FAMILIES

Call = Callable[[Any, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Constructor arguments of a tiny model of the class, and how to call one."""

    config: dict[str, Any]
    call: Call

    def build(self, name: str, **changes: Any) -> Any:
        """The model, every weight random, in eval mode."""
        model = getattr(diffusers, name)(**{**self.config, **changes})
        for (
            parameter
        ) in model.parameters():  # several classes start their modulation or head at zero: every path matters
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def run(self, model: Any, x: Tensor) -> Tensor:
        """One pass with the same conditions every time."""
        torch.manual_seed(5)
        name = type(model).__name__
        return self.call(model, getattr(diffusers, FAMILIES[name].pipeline), x)


def sd3(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        pooled_projections=torch.randn(B, 8, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        return_dict=False,
    )[0]


def flux(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def flux2(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def chroma(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def sana(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        encoder_attention_mask=torch.ones(B, 3, dtype=dt),
        timestep=torch.full((B,), 300.0, dtype=dt),
        return_dict=False,
    )[0]


def pix_art(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def hunyuan(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def di_t(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    return model(
        x,
        timestep=torch.full((B,), 3, dtype=torch.long),
        class_labels=torch.ones(B, dtype=torch.long),
        return_dict=False,
    )[0]


def aura_flow(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        timestep=torch.full((B,), 0.3, dtype=dt),
        return_dict=False,
    )[0]


def lumina2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 0.3, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.long),
        return_dict=False,
    )[0]


def lumina_next(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def cog_view4(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def cog_view3plus(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def qwen_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def qwen_image21(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def zimage(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    out = model(
        [v[:, None] for v in x],
        torch.full((B,), 0.3, dtype=dt),
        [torch.randn(3, 8, dtype=dt) for _ in range(B)],
        return_dict=False,
    )[0]
    return torch.stack([o[:, 0] for o in out])


def hi_dream_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def prx(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        timestep=torch.full((B,), 0.3, dtype=dt),
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        attention_mask=torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


def hunyuan_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 300.0, dtype=dt),
        torch.randn(B, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


def kandinsky5(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def glm_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def ernie_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def krea2(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def nucleus_mo_eimage(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def bria(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def bria_fibo(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def bria_fibo2(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 0.3, dtype=dt),
        torch.randn(B, 2, 3, 8, dtype=dt),
        torch.ones(B, 3, dtype=torch.bool),
        return_dict=False,
    )[0]


def ovis_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def long_cat_image(model: Any, pipe: Any, x: Tensor) -> Tensor:
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


def unet2d(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    dt = x.dtype
    return model(
        x,
        torch.full((B,), 300, dtype=torch.long),
        encoder_hidden_states=torch.randn(B, 3, 8, dtype=dt),
        return_dict=False,
    )[0]


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
        sd3,
    ),
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
        flux,
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
        flux2,
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
        chroma,
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
        sana,
    ),
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
        pix_art,
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
        hunyuan,
    ),
    "DiTTransformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "sample_size": 4,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 1,
        },
        di_t,
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
        aura_flow,
    ),
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
        lumina2,
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
        lumina_next,
    ),
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
        cog_view4,
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
        cog_view3plus,
    ),
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
        qwen_image,
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
        qwen_image21,
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
        zimage,
    ),
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
        hi_dream_image,
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
        prx,
    ),
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
        hunyuan_image,
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
        kandinsky5,
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
        glm_image,
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
        ernie_image,
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
        krea2,
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
        nucleus_mo_eimage,
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
        bria,
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
        bria_fibo,
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
        bria_fibo2,
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
        ovis_image,
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
        long_cat_image,
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
        unet2d,
    ),
}
