"""One row per supported base autoencoder: where its latents leave the encoder and enter the decoder.

Adding one is adding a row here and a line in tests/test_autoencoders.py.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderFamily:
    """How to put a detail latent beside the latent of an autoencoder of one diffusers class.

    Attributes:
        class_name: the diffusers class.
        widths: config key of the encoder's widths, whose number tells the spatial factor.
        last: path of the encoder's last convolution; -1 is the last of a sequence.
        first: path of the decoder's first convolution.
        quant: whether 1x1 convolutions may stand around the latent.
        shortcut: attributes by which encoder and decoder add the latent past those convolutions, where they do.
        checkpointing: whether it has gradient checkpointing, and that leaves its results alone.
    """

    class_name: str
    widths: str = "block_out_channels"
    last: str = "conv_out"
    first: str = "conv_in"
    quant: bool = False
    shortcut: tuple[str, str] | None = None
    checkpointing: bool = True


AUTOENCODERS = {
    row.class_name: row
    for row in (
        AutoencoderFamily("AutoencoderKL", quant=True),
        AutoencoderFamily(
            "AutoencoderDC",
            widths="encoder_block_out_channels",
            shortcut=("out_shortcut", "in_shortcut"),
            checkpointing=False,  # diffusers gives it none
        ),
        # under checkpointing diffusers' EncoderTiny forgets to bring [-1,1] to [0,1]
        AutoencoderFamily(
            "AutoencoderTiny",
            widths="encoder_block_out_channels",
            last="layers.-1",
            first="layers.0",
            checkpointing=False,
        ),
        AutoencoderFamily(
            "PooledAutoencoderTiny",
            widths="encoder_block_out_channels",
            last="layers.-1",
            first="layers.0",
            checkpointing=False,
        ),
    )
}


def autoencoder_family(class_name: str) -> AutoencoderFamily:
    """The row of an autoencoder class; ValueError names the nearest ones that are supported."""
    if class_name not in AUTOENCODERS:
        near = difflib.get_close_matches(class_name, AUTOENCODERS, n=3, cutoff=0.0)
        raise ValueError(
            f"autoencoder class {class_name} is not supported; the nearest that are: {', '.join(near)}. "
            "A row in davae/models/autoencoder_families.py adds one"
        )
    return AUTOENCODERS[class_name]


def layer_path(module: nn.Module, path: str) -> str:
    """A row's path with -1 replaced by the last number there is."""
    if not path.endswith(".-1"):
        return path
    parent = path.removesuffix(".-1")
    return f"{parent}.{len(module.get_submodule(parent)) - 1}"  # type: ignore[arg-type]


def spatial_factor(config: Any, class_name: str) -> int:
    """Pixels per latent position, each way."""
    return 2 ** (len(config[autoencoder_family(class_name).widths]) - 1)


def encode_mode(vae: Any, images: Tensor) -> Tensor:
    """Latents without noise of any supported autoencoder, or of a DetailVAE: (B,3,H,W) in [-1,1] -> (B,C,h,w), raw."""
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


def first_convolution(base: Any, family: AutoencoderFamily) -> tuple[Tensor, Tensor]:
    """Weight (width,C,3,3) and bias (width,) of what a base decoder does first: its convolution with all that can be
    folded into it, a 1x1 convolution before it and a shortcut that repeats channels past it."""
    conv: Any = base.decoder.get_submodule(layer_path(base.decoder, family.first))
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    if family.shortcut is not None and getattr(base.decoder, family.shortcut[1]):
        repeats = weight.shape[0] // weight.shape[1]
        for out in range(weight.shape[0]):
            weight[out, out // repeats, 1, 1] += 1
    post_quant = base.post_quant_conv if family.quant else None
    if post_quant is not None:
        mix = post_quant.weight.detach()[:, :, 0, 0]
        if post_quant.bias is not None:
            bias = bias + torch.einsum("oikl,i->o", weight, post_quant.bias.detach())
        weight = torch.einsum("oikl,ij->ojkl", weight, mix)
    return weight, bias
