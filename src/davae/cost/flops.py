"""FLOPs, counted by torch's own counter on the meta device: no weights, no memory, any size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import latent_channels
from davae.backbones.families import family_of
from davae.backbones.lightning_dit import LightningDiT
from davae.backbones.trainable import LoraSettings, choose_trainable
from davae.pretrained.shapes import BaseShapes
from davae.pretrained.stored import planned
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import decode_latents, encode_mode

BATCHED = ("aten.bmm", "aten.baddbmm")  # what attention becomes where it is not one operator


@dataclass(frozen=True)
class Flops:
    """Two for each multiply-add. Element-wise work (norms, activations, gates) is not counted.

    Attributes:
        attention: products of queries, keys and values.
        linear: products with a weight matrix.
        convolution: 1x1 ones included, which are what some families use as linear layers.
    """

    attention: float = 0.0
    linear: float = 0.0
    convolution: float = 0.0

    @property
    def total(self) -> float:
        return self.attention + self.linear + self.convolution

    def as_dict(self, prefix: str) -> dict[str, float]:
        """Plain keys: `<prefix>_flops` is the total."""
        return {
            f"{prefix}_flops": self.total,
            f"{prefix}_attention_flops": self.attention,
            f"{prefix}_linear_flops": self.linear,
            f"{prefix}_convolution_flops": self.convolution,
        }


def count_flops(run: Callable[[], Any]) -> Flops:
    """FLOPs of whatever `run` computes, by kind of operator."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    kinds = {"attention": 0.0, "linear": 0.0, "convolution": 0.0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        kinds[_kind(str(operator))] += flops
    return Flops(**kinds)


def _kind(operator: str) -> str:
    if "conv" in operator:
        return "convolution"
    return "attention" if operator in BATCHED or "attention" in operator else "linear"


def meta_transformer(shapes: BaseShapes) -> nn.Module:
    """Return the transformer's modules without weights."""
    with planned(f"the {shapes.transformer_class}"):
        return model_class(shapes.transformer_class).from_config(shapes.transformer_config)


def check_lora(shapes: BaseShapes, lora: LoraSettings | None) -> None:
    """Refuse further targets of a LoRA that stage 2 cannot adapt, without loading weights.

    Raises:
        RecipeError: no layer has such a name, or it is trained in full.
    """
    if lora is not None and lora.extra_targets:
        with torch.device("meta"):
            choose_trainable(meta_transformer(shapes), lora)


def meta_detail_vae(shapes: BaseShapes, detail_channels: int, scale: int) -> DetailVAE:
    """Return the DetailVAE's modules without weights."""
    with planned(f"the DetailVAE of {shapes.vae_class}"):
        return DetailVAE(shapes.vae_class, shapes.vae_config, detail_channels, scale)


def meta_autoencoder(shapes: BaseShapes) -> Any:
    """Return the base autoencoder's modules without weights."""
    with planned(f"the {shapes.vae_class}"):
        return model_class(shapes.vae_class).from_config(shapes.vae_config)


def predict_once(model: nn.Module, transformer: nn.Module, latents: Tensor, tokens: int | None = None) -> Tensor:
    """One pass with prompts of the usual length, or with classes: (B,c,h,w) -> the same shape.

    Args:
        model: `transformer`, or a wrapper around it.
        latents: on the device that new tensors get just now.
        tokens: of the prompts where they are shorter than usual.
    """
    batch = len(latents)
    t = torch.empty(batch)
    grid = transformer.at_grid(latents.shape[-1]) if isinstance(transformer, LightningDiT) else nullcontext()
    with grid:
        call, config = family_of(transformer).require_call(), transformer.config
        blank = (part[:, :tokens] if part.ndim == 3 else part for part in call.blank(config))
        parts = tuple(part.expand(batch, *part.shape[1:]).contiguous() for part in blank)
        return call.predict(model, config, latents, t, parts)


def transformer_flops(transformer: nn.Module, side: int, tokens: int | None = None) -> Flops:
    """Return the FLOPs of one pass on side x side latents and one prompt.

    Args:
        transformer: on the meta device.
        side: of the latents.
        tokens: of the prompt where it is shorter than usual.
    """
    with torch.device("meta"):
        latents = torch.empty(1, latent_channels(transformer), side, side)
        return count_flops(lambda: predict_once(transformer, transformer, latents, tokens))


def text_tokens(transformer: nn.Module) -> int:
    """Return the tokens of the longest text that a transformer takes, 0 where it takes a class."""
    family = family_of(transformer)
    if family.condition == "class":
        return 0
    with torch.device("meta"):
        call = family.require_call()
        lengths = [part.shape[1] for part in call.blank(transformer.config) if part.ndim == 3]
        return max(lengths, default=call.TEXT_TOKENS)  # Krea 2's prompts have several layers a token


def autoencoder_flops(vae: Any, resolution: int) -> tuple[Flops, Flops]:
    """Return the FLOPs of encoding and of decoding one square image.

    Args:
        vae: a DetailVAE or a base autoencoder, on the meta device.
        resolution: pixels of the image.
    """
    latents: list[Tensor] = []
    with torch.device("meta"):
        images = torch.empty(1, 3, resolution, resolution)
        encode = count_flops(lambda: latents.append(encode_mode(vae, images)))
        return encode, count_flops(lambda: decode_latents(vae, latents[0]))


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
