"""What a row of `families.py` says of a transformer, and the names that rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from davae.backbones.families import CALLS

TokenOrder = Literal["patch_channel", "channel_patch"]
Condition = Literal["text", "class"]
ObjectiveName = Literal["flow", "epsilon", "v_prediction"]


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
        fixed: parameters that are tables, never trained.
        objectives: what the family's call knows to be asked for; the base pipeline's scheduler picks one.
        classes_key: config key of the number of classes, where `condition` is class.
        patch_key: config key of p; None where the pipeline's packing is all there is, or positions are tokens.
        grid: positions per side that the model groups beside p, so that latents divide by it too.
        guidance: argument by which its pipeline takes a guidance scale.
        negative_prompts: whether its pipeline guides only, or only several prompts, with a negative one given for each.
        default_pixels: what its stock pipeline draws when no size is asked for, where that is a literal.
        upgraded_pipelines: davae's subclasses of stock pipelines that cannot draw an upgrade, or not by default.
        scaled_config: entries of the transformer's config from which its pipeline reads sizes in pixels of the base; an
            upgrade multiplies them by s.
        scaled_options: the same among the pipeline's own options, given in pixels.
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
    embedder_order: TokenOrder = "channel_patch"
    packed: int = 1
    in_key: str = "in_channels"
    out_key: str = "out_channels"
    fixed: tuple[str, ...] = ()
    objectives: tuple[ObjectiveName, ...] = ("flow",)
    classes_key: str | None = None
    patch_key: str | None = "patch_size"
    grid: int = 1
    guidance: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    negative_prompts: bool = False
    default_pixels: int | None = None
    upgraded_pipelines: tuple[str, ...] = ()
    scaled_config: tuple[str, ...] = ()
    scaled_options: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether stage 2 knows how to call the model; the other ones can be expanded."""
        return self.class_name in CALLS


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
DDPM: tuple[ObjectiveName, ...] = ("epsilon", "v_prediction")
