"""Tiles for the local layers of an autoencoder, and the whole grid for all others.

Group normalisation, pooled blocks and attention give other values on a tile than on the image. In all supported autoencoders
but KL ones (`strips`) they lie next to the latent, where the grid has few positions. The layers beyond them are convolutions
and normalisations of one position. They take the memory, and tiles of them differ from the whole only near their edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import autoencoder_dc, autoencoder_kl_qwenimage, autoencoder_kl_wan
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import (
    QwenImage21AttentionBlock,
    QwenImage21Decoder3d,
    QwenImage21Encoder3d,
)
from diffusers.models.autoencoders.vae import DecoderTiny, EncoderTiny
from torch import Tensor, nn

from davae.vae.tiling import Tiling, tiled

Layer = Callable[[Tensor], Tensor]
SEEN = 64  # pixels that neighbouring tiles share at least, where half a tile has as many: local layers see about half of it
SEES_ALL = (
    nn.GroupNorm,
    Attention,
    autoencoder_dc.EfficientViTBlock,
    autoencoder_kl_wan.WanAttentionBlock,
    autoencoder_kl_qwenimage.QwenImageAttentionBlock,
    QwenImage21AttentionBlock,
)
VIDEO_ENCODERS = (
    autoencoder_kl_wan.WanEncoder3d,
    autoencoder_kl_qwenimage.QwenImageEncoder3d,
    QwenImage21Encoder3d,
)
VIDEO_DECODERS = (
    autoencoder_kl_wan.WanDecoder3d,
    autoencoder_kl_qwenimage.QwenImageDecoder3d,
    QwenImage21Decoder3d,
)


def is_local(layer: Any) -> bool:
    """Return whether each value that a layer gives depends on few neighbours of its position."""
    if not isinstance(layer, nn.Module):
        return True
    return not any(isinstance(module, SEES_ALL) for module in layer.modules())


def chain(layers: list[Layer]) -> Layer:
    """Return the layers one after the other as one function."""

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def decoder_layers(decoder: Any, **options: Any) -> list[Layer]:
    """Return a decoder's layers in their order, or the decoder where its class is unknown.

    Args:
        options: what its call takes besides the latents.
    """
    if isinstance(decoder, DecoderTiny):
        return [lambda x: torch.tanh(x / 3) * 3, *decoder.layers, lambda x: x.mul(2).sub(1)]
    if isinstance(decoder, autoencoder_dc.Decoder):
        layers: list[Any] = [
            lambda x: _with_repeated(decoder, x),
            *reversed(decoder.up_blocks),
            lambda x: decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1),
            decoder.conv_act,
            decoder.conv_out,
        ]
        return layers
    if isinstance(decoder, VIDEO_DECODERS):
        blocks = [_Called(block, options) for block in decoder.up_blocks] if options else [*decoder.up_blocks]
        end = [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
        return [decoder.conv_in, decoder.mid_block, *blocks, *end]
    return [_Called(decoder, options)]


def encoder_layers(encoder: Any) -> list[Layer]:
    """Return an encoder's layers in their order, or the encoder where its class is unknown."""
    if isinstance(encoder, EncoderTiny):
        return [lambda x: x.add(1).div(2), *encoder.layers]
    if isinstance(encoder, autoencoder_dc.Encoder):
        return [encoder.conv_in, *encoder.down_blocks, lambda x: _with_average(encoder, x)]
    if isinstance(encoder, VIDEO_ENCODERS):
        end = [encoder.norm_out, encoder.nonlinearity, encoder.conv_out]
        return [encoder.conv_in, *encoder.down_blocks, encoder.mid_block, *end]
    return [encoder]


class _Called(nn.Module):
    """A layer whose call takes options."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.options)


def _with_repeated(decoder: Any, x: Tensor) -> Tensor:
    """Compute a DC decoder's first layer, whose shortcut repeats channels."""
    if not decoder.in_shortcut:
        return decoder.conv_in(x)
    return decoder.conv_in(x) + x.repeat_interleave(decoder.in_shortcut_repeats, dim=1)


def _with_average(encoder: Any, x: Tensor) -> Tensor:
    """Compute a DC encoder's last layer, whose shortcut averages groups of channels."""
    if not encoder.out_shortcut:
        return encoder.conv_out(x)
    return encoder.conv_out(x) + x.unflatten(1, (-1, encoder.out_shortcut_average_group_size)).mean(dim=2)


def decode_in_tiles(decoder: Any, latents: Tensor, tiling: Tiling, factor: int, **options: Any) -> Tensor:
    """Run a decoder on the whole grid up to its last layer that sees all of it, then in tiles.

    Args:
        latents: (B,c,h,w), or one frame (B,c,1,h,w).
        factor: output pixels per latent position, each way.
        options: of the decoder's call.
    """
    layers = decoder_layers(decoder, **options)
    count = max((number for number, layer in enumerate(layers, 1) if not is_local(layer)), default=0)
    x = chain(layers[:count])(latents)
    if count == len(layers):
        return x
    grown = x.shape[-1] // latents.shape[-1]
    left = factor // grown
    return tiled(chain(layers[count:]), x, max(1, tiling.tile // left), _overlap(tiling), left)


def _overlap(tiling: Tiling) -> float:
    """Return the share of a tile that neighbours have in common: small tiles share more of it."""
    return min(0.5, max(tiling.overlap, SEEN / tiling.tile))


def encode_in_tiles(encoder: Any, images: Tensor, tiling: Tiling, factor: int) -> Tensor:
    """Run an encoder in tiles up to its first layer that sees the whole grid, then on the whole.

    Args:
        images: (B,3,H,W), or one frame (B,3,1,H,W).
        factor: pixels of these images per latent position, each way.
    """
    layers = encoder_layers(encoder)
    count = min((number for number, layer in enumerate(layers) if not is_local(layer)), default=len(layers))
    if count == 0:
        return chain(layers)(images)
    local = chain(layers[:count])
    side = 2 * factor
    with torch.no_grad():  # how far the local layers reduce a patch of two latent positions
        shrink = side // local(images[:1, ..., :side, :side]).shape[-1]
    x = tiled(local, images, tiling.tile, _overlap(tiling), 1 / shrink)
    return chain(layers[count:])(x)
