"""Description of a model family.

It holds where latent channels enter and leave the transformer, and how the transformer is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from davae.backbones.call import Call
from davae.errors import ModelError

TokenOrder = Literal["patch_channel", "channel_patch"]
Condition = Literal["text", "class"]
ObjectiveName = Literal["flow", "epsilon", "v_prediction"]


@dataclass(frozen=True)
class Family:
    """Facts about the models of one class: how davae widens and calls them.

    Attributes:
        class_name: class of the model, in diffusers or davae.
        pipeline: the stock pipeline that runs the model.
        variants: other stock pipelines of the class that draw from a prompt alone.
        embedder: module path of P, a convolution or linear over the input channels.
        head: module path of O, a linear or convolution over the output channels.
        head_order: order of a token's outputs: `patch_channel` (p,p,c), channels innermost, or `channel_patch` (c,p,p).
        lora_targets: ends of the names of the layers that LoRA adapts, as regular expressions: attention and feed-forward, in
            both streams.
        call: how a training step calls the model; None where the model can be expanded but not trained.
        condition: what an image is drawn from: a prompt or a class number.
        attributes: instance attributes that hold the number of channels, in or out.
        component: the model's name in its pipeline.
        embedder_order: order of a linear embedder's inputs, as `head_order`.
        packed: latent positions that the pipeline packs into the channels of one token before the transformer sees them.
        in_key, out_key: config keys of the channels that go in and come out.
        fixed: parameters that are tables, never trained.
        objectives: predictions that the call can be trained for; the base pipeline's scheduler picks one.
        classes_key: config key of the number of classes, where `condition` is class.
        patch_key: config key of p; None where only the pipeline packs positions, or positions are tokens.
        grid: positions per side that the model groups in addition to p, so that latents divide by it too.
        guidance: argument by which the pipeline takes a guidance scale; `true_cfg_scale` where `guidance_scale` is an input.
        no_guidance: least scale that the pipeline takes, which turns guidance off; None where it takes any, and 1 does so.
        negative_prompts: whether the pipeline guides only, or only several prompts, with a negative prompt for each.
        fixed_side: latent positions of the square to whose area the pipeline rescales all sizes; None where it draws any.
        default_pixels: side of the images that the stock pipeline draws by default, where its code has a literal.
        upgraded_pipelines: davae's subclasses of stock pipelines that cannot draw an upgrade, or not by default.
        scaled_config: entries of the transformer's config from which the pipeline reads sizes in pixels of the base; an
            upgrade multiplies them by s.
        scaled_options: options of the pipeline with sizes in pixels of the base; an upgrade multiplies them by s.
        blocks: module path of the blocks whose outputs are image tokens (B,L,w), with those of the text before them in joint
            blocks; None where davae reads no features.
        detail_time: module path of the modulation by the detail's own time; None where all channels share one time.
        detail_head: whether the class is davae's own and takes a `DetailHead`.
    """

    class_name: str
    pipeline: str
    embedder: str
    head: str
    head_order: TokenOrder
    lora_targets: tuple[str, ...]
    call: Call | None = None
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
    no_guidance: float | None = None
    negative_prompts: bool = False
    fixed_side: int | None = None
    default_pixels: int | None = None
    upgraded_pipelines: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    scaled_config: tuple[str, ...] = ()
    scaled_options: tuple[str, ...] = ()
    blocks: str | None = None
    detail_time: str | None = None
    detail_head: bool = False

    @property
    def trains(self) -> bool:
        """Return whether stage 2 can call the model.

        The other families can only be expanded.
        """
        return self.call is not None

    def guide(self, config: Any, scale: float, prompts: int) -> dict[str, Any]:
        """Return a pipeline's arguments that guide prompts away from the empty prompt.

        A guidance-distilled model takes the scale as an input instead.

        Args:
            config: of the model.
            scale: guidance scale; 1 or less turns guidance off.
            prompts: number of prompts in the call.
        """
        if self.guidance == "true_cfg_scale" and config.get("guidance_embeds"):
            return {"guidance_scale": scale, "true_cfg_scale": 1.0}
        negative = {"negative_prompt": [""] * prompts} if self.negative_prompts and scale > 1 else {}
        if self.no_guidance is not None:  # Z-Image and Krea 2 count from 0, where others count from 1
            scale = max(scale - (1 - self.no_guidance), self.no_guidance)
        return {self.guidance: scale, **negative}

    def check_pipeline(self, name: str, what: str) -> None:
        """Refuse a base whose pipeline draws from more than a prompt or a class.

        Raises:
            ModelError: names `what`, and the pipelines whose models can be upgraded.
        """
        known = (self.pipeline, *self.variants)
        if name not in (*known, *self.upgraded_pipelines):
            raise ModelError(
                f"{what} is a {name}, and davae upgrades models that draw from a prompt or a class alone "
                f"({', '.join(known)}); give such a model, or, where it is one, correct _class_name in its model_index.json"
            )

    def require_call(self) -> Call:
        """Return how the model is called.

        Raises:
            ModelError: a family that can only be expanded.
        """
        if self.call is None:
            raise ModelError(f"expand_transformer widens a {self.class_name}, but davae cannot call or train one yet")
        return self.call


def patch_size(config: Any, family: Family) -> int:
    """Return p, the latent positions per token each way, packed by the model or its pipeline."""
    own = 1 if family.patch_key is None else config[family.patch_key]
    side = own if isinstance(own, int) else own[0]  # some list one per axis, or per size that they know
    return side * math.isqrt(family.packed)


def longest_side(config: Any) -> int | None:
    """Return the tokens of a side that a transformer has positions for, None for any.

    Args:
        config: of the transformer.
    """
    known = None if "rope_axes_dim" in config else config.get("pos_embed_max_size")  # CogView4's is never read
    if known is not None and "num_mmdit_layers" in config:
        return math.isqrt(known)  # AuraFlow counts the positions of a square
    return known


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the text's side of a joint attention
MLP = ("ff.net.0.proj", "ff.net.2")
TEXT_MLP = ("ff_context.net.0.proj", "ff_context.net.2")
FLUX_LAYERS = (*ATTENTION, *JOINT, *MLP, *TEXT_MLP, "proj_mlp", r"single_transformer_blocks.\d+.proj_out")
GATED = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
SWIGLU = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

PC: TokenOrder = "patch_channel"
CP: TokenOrder = "channel_patch"
OUT = ("out_channels",)
BOTH = ("in_channels", "out_channels")
DDPM: tuple[ObjectiveName, ...] = ("epsilon", "v_prediction")
