"""One row per supported model: where its channels enter and leave, and in which order a token packs them.

Adding a family is adding a row here and a test.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import diffusers

TokenOrder = Literal["patch_channel", "channel_patch"]
Condition = Literal["text", "class"]


@dataclass(frozen=True)
class TransformerFamily:
    """How to widen a transformer of one diffusers class.

    Attributes:
        class_name: the diffusers class.
        embedder: module path of P, a convolution or linear over the input channels.
        head: module path of O, a linear or convolution over the output channels.
        head_order: how a token's outputs are laid out: `patch_channel` (p,p,c), channels innermost, or
            `channel_patch` (c,p,p).
        embedder_order: the same for a linear embedder's inputs.
        packed: latent positions that the pipeline packs into the channels of one token before the transformer sees them.
        in_key, out_key: config keys of the channels that go in and come out.
        attributes: instance attributes that hold the number of channels, in or out.
        pipeline: the stock pipeline that runs the model.
        lora_targets: ends of the names of the layers that LoRA adapts, as regular expressions: attention and feed-forward, in
            both streams.
        condition: what a picture is asked for by: a prompt or a class number.
        component: the model's name in its pipeline.
        trains: whether stage 2 knows how to call the model; the other ones can be expanded.
        fixed: parameters that are tables, never trained.
    """

    class_name: str
    pipeline: str
    embedder: str
    head: str
    head_order: TokenOrder
    lora_targets: tuple[str, ...]
    condition: Condition = "text"
    attributes: tuple[str, ...] = ()
    component: str = "transformer"
    trains: bool = False
    embedder_order: TokenOrder = "channel_patch"
    packed: int = 1
    in_key: str = "in_channels"
    out_key: str = "out_channels"
    fixed: tuple[str, ...] = ()


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the text's side of a joint attention
MLP = ("ff.net.0.proj", "ff.net.2")
TEXT_MLP = ("ff_context.net.0.proj", "ff_context.net.2")
FLUX = (*ATTENTION, *JOINT, *MLP, *TEXT_MLP, "proj_mlp", r"single_transformer_blocks.\d+.proj_out")
GATED = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
SWIGLU = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

PC: TokenOrder = "patch_channel"
CP: TokenOrder = "channel_patch"
OUT = ("out_channels",)
BOTH = ("in_channels", "out_channels")

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
            trains=True,
        ),
        TransformerFamily(
            "LightningDiT",
            "ClassConditionalPipeline",
            "x_embedder.proj",
            "final_layer.linear",
            PC,
            ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2"),
            condition="class",
            trains=True,
            fixed=("pos_embed",),
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
            trains=True,
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
        ),
        TransformerFamily(
            "PixArtTransformer2DModel",
            "PixArtAlphaPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *MLP),
            attributes=OUT,
        ),
        TransformerFamily(
            "HunyuanDiT2DModel",
            "HunyuanDiTPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *MLP),
            attributes=OUT,
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
        ),
        TransformerFamily(
            "AuraFlowTransformer2DModel",
            "AuraFlowPipeline",
            "pos_embed.proj",
            "proj_out",
            PC,
            (*ATTENTION, *JOINT, r"ff(_context)?.(linear_1|linear_2|out_projection)"),
            attributes=OUT,
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
        ),
        TransformerFamily(
            "LuminaNextDiT2DModel",
            "LuminaPipeline",
            "patch_embedder.proj",
            "norm_out.linear_2",
            PC,
            (*ATTENTION, *SWIGLU),
            attributes=BOTH,
        ),
        TransformerFamily(
            "CogView4Transformer2DModel", "CogView4Pipeline", "patch_embed.proj", "proj_out", CP, (*ATTENTION, *MLP)
        ),
        TransformerFamily(
            "CogView3PlusTransformer2DModel",
            "CogView3PlusPipeline",
            "patch_embed.proj",
            "proj_out",
            CP,
            (*ATTENTION, *MLP),
            attributes=("out_channels", "patch_embed.in_channels"),
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
        ),
        TransformerFamily(
            "QwenImage21Transformer2DModel",
            "QwenImage21Pipeline",
            "img_in",
            "proj_out",
            CP,
            (*ATTENTION, "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
            attributes=OUT,
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
        ),
        TransformerFamily(
            "UNet2DConditionModel",
            "StableDiffusionPipeline",
            "conv_in",
            "conv_out",
            PC,
            (*ATTENTION, *MLP, "proj_in"),
            component="unet",
        ),
    )
}


def transformer_family(class_name: str) -> TransformerFamily:
    """The row of a transformer class; ValueError names the nearest ones that are supported."""
    if class_name not in TRANSFORMERS:
        near = difflib.get_close_matches(class_name, TRANSFORMERS, n=3, cutoff=0.0)
        raise ValueError(
            f"transformer class {class_name} is not supported; the nearest of {len(TRANSFORMERS)} that are: "
            f"{', '.join(near)}. A row in davae/models/families.py adds one"
        )
    return TRANSFORMERS[class_name]


def model_class(name: str) -> Any:
    """A model or pipeline class by the name that configs give it: diffusers' own, or one of davae's."""
    import davae  # its public names; imported late, they live in this package's layers

    home = diffusers if hasattr(diffusers, name) else davae
    if not hasattr(home, name):
        raise ValueError(f"neither diffusers nor davae has a class {name}")
    return getattr(home, name)
