"""One row per supported model: where its channels enter and leave, and in which order a token packs them.

Adding a family is adding a row here and a test.
"""

from __future__ import annotations

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
        lora_targets: module names that LoRA adapts: attention and feed-forward, in both streams.
        condition: what a picture is asked for by: a prompt or a class number.
        text_tokens: tokens beside the image's in every attention.
        fixed: parameters that are tables, never trained.
    """

    class_name: str
    embedder: str
    head: str
    head_order: TokenOrder
    attributes: tuple[str, ...]
    pipeline: str
    lora_targets: tuple[str, ...]
    condition: Condition
    embedder_order: TokenOrder = "channel_patch"
    packed: int = 1
    in_key: str = "in_channels"
    out_key: str = "out_channels"
    text_tokens: int = 0
    fixed: tuple[str, ...] = ()


TRANSFORMERS = {
    row.class_name: row
    for row in (
        TransformerFamily(
            class_name="SD3Transformer2DModel",
            embedder="pos_embed.proj",
            head="proj_out",
            head_order="patch_channel",
            attributes=("out_channels",),
            pipeline="StableDiffusion3Pipeline",
            lora_targets=(
                *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
                *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
                *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
                *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            ),
            condition="text",
            text_tokens=333,  # 77 of CLIP and 256 of T5
        ),
        TransformerFamily(
            class_name="LightningDiT",
            embedder="x_embedder.proj",
            head="final_layer.linear",
            head_order="patch_channel",
            attributes=(),
            pipeline="ClassConditionalPipeline",
            lora_targets=("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2"),
            condition="class",
            fixed=("pos_embed",),
        ),
    )
}


def transformer_family(class_name: str) -> TransformerFamily:
    """The row of a transformer class; ValueError names what is supported."""
    if class_name not in TRANSFORMERS:
        raise ValueError(f"transformer class {class_name} is not supported; davae knows {', '.join(TRANSFORMERS)}")
    return TRANSFORMERS[class_name]


def model_class(name: str) -> Any:
    """A model or pipeline class by the name that configs give it: diffusers' own, or one of davae's."""
    import davae  # its public names; imported late, they live in this package's layers

    home = diffusers if hasattr(diffusers, name) else davae
    if not hasattr(home, name):
        raise ValueError(f"neither diffusers nor davae has a class {name}")
    return getattr(home, name)


AUTOENCODERS = ("AutoencoderKL",)


def check_autoencoder(class_name: str) -> None:
    """ValueError when a base autoencoder's class is not supported."""
    if class_name not in AUTOENCODERS:
        raise ValueError(f"autoencoder class {class_name} is not supported; davae knows {', '.join(AUTOENCODERS)}")
