"""One row for each supported base autoencoder.

A row names where latents leave the encoder and where they enter the decoder.

Adding one is adding a row here and a line in tests/vae/test_autoencoders.py.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from davae.errors import ModelError
from davae.vae.pooled_tiny import PooledAutoencoderTiny


@dataclass(frozen=True)
class AutoencoderFamily:
    """Layers between which the latent of one diffusers autoencoder class lies.

    Attributes:
        class_name: the diffusers class.
        widths: config key of the encoder's widths, whose number gives the spatial factor.
        channels: config key of C.
        last: path of the encoder's last convolution; -1 is the last of a sequence.
        first: path of the decoder's first convolution.
        quant: whether 1x1 convolutions may lie around the latent.
        shortcut: attributes by which encoder and decoder add the latent past those convolutions, where they do.
        checkpointing: whether it has gradient checkpointing, and that leaves its results alone.
        cell: side of the cells of latent positions that have statistics of their own: 2 where the pipeline normalises
            2x2 packed positions.
        video: whether it is a video autoencoder, which sees an image as one frame (B,c,1,h,w).
        first_chunk: whether its decoder takes an option that marks the first frame.
    """

    class_name: str
    widths: str = "block_out_channels"
    channels: str = "latent_channels"
    last: str = "conv_out"
    first: str = "conv_in"
    quant: bool = False
    shortcut: tuple[str, str] | None = None
    checkpointing: bool = True
    cell: int = 1
    video: bool = False
    first_chunk: bool = False


VIDEO: dict[str, Any] = {"widths": "dim_mult", "channels": "z_dim", "quant": True, "video": True}

AUTOENCODERS = {
    row.class_name: row
    for row in (
        AutoencoderFamily("AutoencoderKL", quant=True),
        AutoencoderFamily("AutoencoderKLFlux2", quant=True, cell=2),
        AutoencoderFamily("AutoencoderKLQwenImage", **VIDEO),
        AutoencoderFamily("AutoencoderKLQwenImage21", **VIDEO, first_chunk=True),
        AutoencoderFamily("AutoencoderKLWan", **VIDEO, first_chunk=True),
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
    """Return the row of an autoencoder class.

    Raises:
        ValueError: a class that is not supported; the nearest supported classes are named.
    """
    if class_name not in AUTOENCODERS:
        near = difflib.get_close_matches(class_name, AUTOENCODERS, n=3, cutoff=0.0)
        raise ValueError(
            f"autoencoder class {class_name} is not supported; the nearest that are: {', '.join(near)}. "
            "A row in davae/vae/base.py adds one"
        )
    return AUTOENCODERS[class_name]


def autoencoder_class(class_name: str) -> Any:
    """Return a supported autoencoder's class, diffusers' own or davae's."""
    if class_name == PooledAutoencoderTiny.__name__:
        return PooledAutoencoderTiny
    return getattr(diffusers, autoencoder_family(class_name).class_name)


def layer_path(module: nn.Module, path: str) -> str:
    """Return a row's path with -1 replaced by the number of the last layer."""
    if not path.endswith(".-1"):
        return path
    parent = path.removesuffix(".-1")
    return f"{parent}.{len(module.get_submodule(parent)) - 1}"  # type: ignore[arg-type]


def spatial_factor(config: Any, class_name: str) -> int:
    """Return the pixels per latent position, each way: of a DetailVAE, s times its base's.

    Args:
        config: the autoencoder's config; a DetailVAE's contains its base's.
        class_name: the autoencoder's class.
    """
    if "base_class" in config:
        return spatial_factor(config["base_config"], config["base_class"]) * config["scale"]
    family = autoencoder_family(class_name)
    patch = (config.get("patch_size") or 1) if family.video else 1
    return 2 ** (len(config[family.widths]) - 1) * patch


def image_side(model: Any, chosen: int | None = None, least: int = 1) -> int:
    """Return the side of the images that an autoencoder takes, in pixels: the chosen or its own.

    A DetailVAE knows the size that it was trained on; the `sample_size` of its config is s times its base's own.

    Args:
        model: the autoencoder.
        chosen: the side that a person named.
        least: smallest side.

    Raises:
        ModelError: a class whose config has no size, or a side that does not divide into latent positions or is too small.
    """
    side = chosen or model.config.get("resolution") or model.config.get("sample_size")
    if side is None:
        raise ModelError(f"an {type(model).__name__} has no size of its own; give --resolution")
    factor = spatial_factor(model.config, type(model).__name__)
    if side % factor or side < least:
        smallest = -(-least // factor) * factor
        raise ModelError(
            f"{side} pixels: this {type(model).__name__} takes sides that are divisible by {factor}, at least {smallest}; "
            f"use {max(smallest, round(side / factor) * factor)}"
        )
    return int(side)


def base_channels(config: Any, class_name: str) -> int:
    """Return C, the channels of a base autoencoder's latents."""
    return int(config[autoencoder_family(class_name).channels])


def base_statistics(config: Any) -> tuple[list[float], list[float]]:
    """Return the mean and std of each channel by which pipelines normalise a base's latents."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        factor = float(config.get("scaling_factor") or 1.0)
        return list(config["latents_mean"]), [float(std) / factor for std in config["latents_std"]]
    scaling, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    channels = int(config["latent_channels"])
    return [shift] * channels, [1 / scaling] * channels


def packed_statistics(base_vae: Any) -> tuple[list[float], list[float]]:
    """Return mean and std, (c,2,2), of an autoencoder whose pipelines pack positions.

    They are those of its batch norm over 2x2 positions: 4C values each.
    """
    variance = base_vae.bn.running_var.cpu().double() + base_vae.config["batch_norm_eps"]
    return base_vae.bn.running_mean.tolist(), variance.sqrt().tolist()


def convolution_at(network: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return copies of a convolution's weight (out,in,3,3) and bias (out,).

    A single frame meets the last slice alone of a convolution over time, (out,in,t,3,3).
    """
    conv: Any = network.get_submodule(layer_path(network, path))
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    return (weight[:, :, -1] if weight.ndim == 5 else weight), bias


def last_convolution(base: Any, family: AutoencoderFamily) -> tuple[Tensor, Tensor]:
    """Return a base encoder's last convolution, weight (C,width,3,3) and bias (C,), of the mean.

    A shortcut that averages channels past the last convolution, and a 1x1 convolution after it, are folded in.
    """
    weight, bias = convolution_at(base.encoder, family.last)
    if family.shortcut is not None and getattr(base.encoder, family.shortcut[0]):
        group = weight.shape[1] // weight.shape[0]
        for out in range(weight.shape[0]):
            weight[out, out * group : (out + 1) * group, 1, 1] += 1 / group
    quant = base.quant_conv if family.quant else None
    if quant is not None:
        mix = quant.weight.detach().flatten(1)  # (2C,2C) of a 1x1 convolution
        bias = mix @ bias if quant.bias is None else mix @ bias + quant.bias.detach()
        weight = torch.einsum("oj,jikl->oikl", mix, weight)
    channels = base_channels(base.config, family.class_name)
    return weight[:channels], bias[:channels]  # means come before log-variances


def first_convolution(base: Any, family: AutoencoderFamily) -> tuple[Tensor, Tensor]:
    """Return a base decoder's first convolution, weight (width,C,3,3) and bias (width,).

    A 1x1 convolution before it, and a shortcut that repeats channels past it, are folded in.
    """
    weight, bias = convolution_at(base.decoder, family.first)
    if family.shortcut is not None and getattr(base.decoder, family.shortcut[1]):
        repeats = weight.shape[0] // weight.shape[1]
        for out in range(weight.shape[0]):
            weight[out, out // repeats, 1, 1] += 1
    post_quant = base.post_quant_conv if family.quant else None
    if post_quant is not None:
        mix = post_quant.weight.detach().flatten(1)  # (C,C) of a 1x1 convolution
        if post_quant.bias is not None:
            bias = bias + torch.einsum("oikl,i->o", weight, post_quant.bias.detach())
        weight = torch.einsum("oikl,ij->ojkl", weight, mix)
    return weight, bias
