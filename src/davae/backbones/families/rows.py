"""One row per supported model: where its channels enter and leave, and in which order a token packs them.

Adding a family is adding a row here and a test.
"""

from __future__ import annotations

import difflib
from typing import Any

import diffusers

from davae.backbones.family import (
    ATTENTION,
    BOTH,
    CP,
    DDPM,
    FLUX,
    GATED,
    JOINT,
    MLP,
    OUT,
    PC,
    SWIGLU,
    TEXT_MLP,
    TransformerFamily,
)
from davae.errors import ModelError

TRANSFORMERS = {
    row.class_name: row
    for row in (
        TransformerFamily(
            "SD3Transformer2DModel",
            "StableDiffusion3Pipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *JOINT, *MLP, *TEXT_MLP),
            attributes=OUT,
        ),
        TransformerFamily(
            "LightningDiT",
            "ClassConditionalPipeline",
            "x_embedder.proj",
            "final_layer.linear",
            PC,
            ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2"),
            condition="class",
            fixed=("pos_embed",),
            objectives=("flow", "epsilon"),
            classes_key="num_classes",
        ),
        TransformerFamily(
            "FluxTransformer2DModel",
            "FluxPipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            packed=4,
            attributes=OUT,
        ),
        TransformerFamily(
            "Flux2Transformer2DModel",
            "Flux2Pipeline",
            "x_embedder",
            "proj_out",
            CP,
            (*ATTENTION, *JOINT, r"ff(_context)?.linear_(in|out)", "to_qkv_mlp_proj", r"single_\w+.\d+.attn.to_out"),
            packed=4,
            attributes=OUT,
        ),
        TransformerFamily(
            "ChromaTransformer2DModel",
            "ChromaPipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            packed=4,
            attributes=OUT,
        ),
        TransformerFamily(
            "SanaTransformer2DModel",
            "SanaPipeline",
            "patch_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, "ff.conv_inverted", "ff.conv_point"),
            # the pipeline picks its table of sizes by sample_size; positions are sample_size / interpolation_scale apart
            scaled_config=("sample_size", "interpolation_scale"),
        ),
        TransformerFamily(
            "PixArtTransformer2DModel",
            "PixArtAlphaPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *MLP),
            attributes=OUT,
            objectives=DDPM,
            upgraded_pipelines=("DetailPixArtAlphaPipeline", "DetailPixArtSigmaPipeline"),
        ),
        TransformerFamily(
            "HunyuanDiT2DModel",
            "HunyuanDiTPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *MLP),
            attributes=OUT,
            objectives=DDPM,
            upgraded_pipelines=("DetailHunyuanDiTPipeline",),
        ),
        TransformerFamily(
            "DiTTransformer2DModel",
            "DiTPipeline",
            "pos_embed.proj",
            "proj_out_2",
            PC,
            (*ATTENTION, *MLP),
            attributes=OUT,
            condition="class",
            objectives=DDPM,
            classes_key="num_embeds_ada_norm",
        ),
        TransformerFamily(
            "AuraFlowTransformer2DModel",
            "AuraFlowPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *JOINT, r"ff(_context)?.(linear_1|linear_2|out_projection)"),
            attributes=OUT,
            default_pixels=1024,
            upgraded_pipelines=("DetailAuraFlowPipeline",),
        ),
        TransformerFamily(
            "Lumina2Transformer2DModel",
            "Lumina2Pipeline",
            "x_embedder",
            "norm_out.linear_2",
            PC,
            (*ATTENTION, *SWIGLU),
            embedder_order=PC,
            attributes=OUT,
            upgraded_pipelines=("DetailLumina2Pipeline",),
        ),
        TransformerFamily(
            "LuminaNextDiT2DModel",
            "LuminaPipeline",
            "patch_embedder.proj",
            "norm_out.linear_2",
            PC,
            (*ATTENTION, *SWIGLU),
            attributes=BOTH,
            upgraded_pipelines=("DetailLuminaPipeline",),
        ),
        TransformerFamily(
            "CogView4Transformer2DModel",
            "CogView4Pipeline",
            "patch_embed.proj",
            "proj_out",
            CP,
            (*ATTENTION, *MLP),
        ),
        TransformerFamily(
            "CogView3PlusTransformer2DModel",
            "CogView3PlusPipeline",
            "patch_embed.proj",
            "proj_out",
            CP,
            (*ATTENTION, *MLP),
            attributes=("out_channels", "patch_embed.in_channels"),
            objectives=DDPM,
        ),
        TransformerFamily(
            "QwenImageTransformer2DModel",
            "QwenImagePipeline",
            "img_in",
            "proj_out",
            CP,
            (*ATTENTION, *JOINT, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
            packed=4,
            attributes=OUT,
            patch_key=None,
            guidance="true_cfg_scale",
            negative_prompts=True,
        ),
        TransformerFamily(
            "QwenImage21Transformer2DModel",
            "QwenImage21Pipeline",
            "img_in",
            "proj_out",
            CP,
            (*ATTENTION, "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
            attributes=OUT,
            grid=2,
            guidance="true_cfg_scale",
            negative_prompts=True,
            default_pixels=1024,
            upgraded_pipelines=("DetailQwenImage21Pipeline",),
        ),
        TransformerFamily(
            "ZImageTransformer2DModel",
            "ZImagePipeline",
            "all_x_embedder.2-1",
            "all_final_layer.2-1.linear",
            PC,
            (*ATTENTION, *GATED),
            embedder_order=PC,
            attributes=BOTH,
            patch_key="all_patch_size",
            default_pixels=1024,
            upgraded_pipelines=("DetailZImagePipeline",),
        ),
        TransformerFamily(
            "HiDreamImageTransformer2DModel",
            "HiDreamImagePipeline",
            "x_embedder.proj",
            "final_layer.linear",
            PC,
            ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "w1", "w2", "w3"),
            embedder_order=PC,
            attributes=OUT,
        ),
        TransformerFamily(
            "PRXTransformer2DModel",
            "PRXPipeline",
            "img_in",
            "final_layer.linear",
            CP,
            ("img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"),
            attributes=BOTH,
            scaled_options=("default_sample_size",),
        ),
        TransformerFamily(
            "HunyuanImageTransformer2DModel",
            "HunyuanImagePipeline",
            "x_embedder.proj",
            "proj_out",
            CP,
            FLUX,
        ),
        TransformerFamily(
            "Kandinsky5Transformer3DModel",
            "Kandinsky5T2IPipeline",
            "visual_embeddings.in_layer",
            "out_layer.out_layer",
            CP,
            (r"to_(query|key|value)", r"feed_forward.(in|out)_layer", r"(self|cross)_attention.out_layer"),
            embedder_order=PC,
            in_key="in_visual_dim",
            out_key="out_visual_dim",
            attributes=("in_visual_dim",),
        ),
        TransformerFamily(
            "GlmImageTransformer2DModel",
            "GlmImagePipeline",
            "image_projector.proj",
            "proj_out",
            CP,
            (*ATTENTION, *MLP),
        ),
        TransformerFamily(
            "ErnieImageTransformer2DModel",
            "ErnieImagePipeline",
            "x_embedder.proj",
            "final_linear",
            CP,
            (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
            packed=4,
            attributes=BOTH,
            default_pixels=1024,
            upgraded_pipelines=("DetailErnieImagePipeline",),
        ),
        TransformerFamily(
            "Krea2Transformer2DModel",
            "Krea2Pipeline",
            "img_in",
            "final_layer.linear",
            CP,
            (*ATTENTION, "ff.gate", "ff.up", "ff.down"),
            packed=4,
            attributes=BOTH,
            patch_key=None,
            default_pixels=1024,
            upgraded_pipelines=("DetailKrea2Pipeline",),
        ),
        TransformerFamily(
            "NucleusMoEImageTransformer2DModel",
            "NucleusMoEImagePipeline",
            "img_in",
            "proj_out",
            CP,
            (*ATTENTION, "add_k_proj", "add_v_proj", "img_mlp.net.0.proj", "img_mlp.net.2", "encoder_proj"),
            packed=4,
            attributes=OUT,
            patch_key=None,
        ),
        TransformerFamily(
            "BriaTransformer2DModel",
            "BriaPipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            packed=4,
            attributes=OUT,
        ),
        TransformerFamily(
            "BriaFiboTransformer2DModel",
            "BriaFiboPipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            attributes=OUT,
        ),
        TransformerFamily(
            "BriaFibo2Transformer2DModel",
            "BriaFibo2Pipeline",
            "x_embedder",
            "final_layer.linear",
            CP,
            (*ATTENTION, *GATED),
        ),
        TransformerFamily(
            "OvisImageTransformer2DModel",
            "OvisImagePipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            packed=4,
            attributes=OUT,
        ),
        TransformerFamily(
            "LongCatImageTransformer2DModel",
            "LongCatImagePipeline",
            "x_embedder",
            "proj_out",
            CP,
            FLUX,
            packed=4,
            attributes=OUT,
            negative_prompts=True,
            upgraded_pipelines=("DetailLongCatImagePipeline",),
        ),
        TransformerFamily(
            "UNet2DConditionModel",
            "StableDiffusionPipeline",
            "conv_in",
            "conv_out",
            PC,
            (*ATTENTION, *MLP, "proj_in"),
            component="unet",
            objectives=DDPM,
            patch_key=None,
        ),
    )
}


def transformer_family(class_name: str) -> TransformerFamily:
    """The row of a transformer class; ValueError names the nearest ones that are supported."""
    if class_name not in TRANSFORMERS:
        near = difflib.get_close_matches(class_name, TRANSFORMERS, n=3, cutoff=0.0)
        raise ValueError(
            f"transformer class {class_name} is not supported; the nearest of {len(TRANSFORMERS)} that are: "
            f"{', '.join(near)}. A row in davae/backbones/families/rows.py adds one"
        )
    return TRANSFORMERS[class_name]


def model_class(name: str) -> Any:
    """A model or pipeline class by the name that configs give it: diffusers' own, or one of davae's."""
    import davae  # its public names; imported late, they live in this package's layers

    home = diffusers if hasattr(diffusers, name) else davae
    found = getattr(home, name, None) if name.isidentifier() else None
    if not isinstance(found, type):
        raise ValueError(f"neither diffusers nor davae has a class {name[:80]}")
    return found


COMPONENTS = tuple(dict.fromkeys(row.component for row in TRANSFORMERS.values()))


def denoiser(pipeline: Any) -> Any:
    """A pipeline's transformer or U-Net.

    Raises:
        ModelError: it has neither.
    """
    for name in COMPONENTS:
        if name in pipeline.components:
            return pipeline.components[name]
    raise ModelError(f"a {type(pipeline).__name__} has no transformer or U-Net")
