"""An AutoencoderKL's encoder or decoder in little memory: layer by layer, in strips of rows.

Tiles that are decoded on their own differ from the whole picture, as group normalisation sees another mean and variance in
each and attention another neighbourhood. Here every layer sees the whole picture: statistics are summed over all strips
before a strip is normalised, convolutions read the rows they need from their neighbours, and attention takes
all keys and values to the queries of a strip.

What is kept is one activation in half precision, and its successor where the size changes: a residual block writes over
its input. The activation between its two convolutions is computed twice, once for its statistics and once for use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from torch import Tensor, nn

from davae.vae.blocks import DetailDown

Change = Callable[[Tensor], Tensor]
LARGEST = 2.0**15  # what a stored value may reach, half of float16's maximum


class Rows:
    """An activation (B,c,H,W) kept in half precision, with a power of two for each row.

    Activations of 16-bit models are kept as they are.
    """

    def __init__(self, batch: int, channels: int, height: int, width: int, like: Tensor, exact: bool = False):
        self.dtype = like.dtype
        kept = torch.float16 if like.dtype.itemsize > 2 and not exact else like.dtype
        self.data = torch.empty(batch, channels, height, width, dtype=kept, device=like.device)
        self.scale = torch.ones(height, 1, dtype=torch.float32, device=like.device)

    @classmethod
    def of(cls, whole: Tensor, step: int) -> Rows:
        rows = cls(*whole.shape, like=whole)
        for top, bottom in strips(whole.shape[2], step):
            rows.write(top, whole[:, :, top:bottom])
        return rows

    @classmethod
    def around(cls, whole: Tensor) -> Rows:
        """Return an activation that is there already, as it is."""
        rows = cls(0, 0, 0, 0, like=whole, exact=True)
        rows.data = whole
        return rows

    def first(self, channels: int) -> Rows:
        """Rows that take the place of the first channels of this activation."""
        rows = copy.copy(self)
        rows.data = self.data[:, :channels]
        return rows

    @property
    def height(self) -> int:
        return self.data.shape[2]

    def like(self) -> Tensor:
        """Return an empty tensor of the model's precision and device."""
        return torch.empty(0, dtype=self.dtype, device=self.data.device)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top..bottom-1 (B,c,bottom-top,W) in the model's precision."""
        piece = self.data[:, :, top:bottom].to(self.dtype)
        return piece if self.data.dtype == self.dtype else piece.mul_(self.scale[top:bottom].to(piece))

    def write(self, top: int, piece: Tensor) -> None:
        bottom = top + piece.shape[2]
        if self.data.dtype != self.dtype:
            highest = piece.abs().amax(dim=(0, 1, 3)).clamp(min=LARGEST)  # (rows,)
            self.scale[top:bottom, 0] = torch.exp2(torch.log2(highest / LARGEST).ceil())
            piece = piece / self.scale[top:bottom].to(piece)
        self.data[:, :, top:bottom] = piece

    def whole(self) -> Tensor:
        return self.read(0, self.height)


def strips(height: int, step: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of strips of at most `step` rows."""
    for top in range(0, height, step):
        yield top, min(top + step, height)


class Statistics:
    """Mean and variance of each group of a group normalisation, summed over strips in float64."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm, self.count = norm, 0
        self.total: Tensor | float = 0.0  # (B,groups)
        self.squares: Tensor | float = 0.0

    def add(self, piece: Tensor) -> None:
        grouped = piece.reshape(len(piece), self.norm.num_groups, -1)
        if grouped.dtype == torch.float16:  # squares above 256 overflow
            grouped = grouped.float()
        wide = torch.float32 if piece.device.type == "mps" else torch.float64  # Apple's devices have no float64
        self.total = self.total + grouped.sum(-1, dtype=wide)
        self.squares = self.squares + grouped.square().sum(-1, dtype=wide)
        self.count += grouped.shape[-1]

    def change(self, dtype: torch.dtype) -> Change:
        """Return the normalisation, for one strip at a time."""
        norm, mean = self.norm, cast(Tensor, self.total / self.count)
        inverse = (self.squares / self.count - mean.square() + norm.eps).rsqrt()
        each = norm.num_channels // norm.num_groups
        gain = inverse.repeat_interleave(each, 1) * norm.weight.to(mean.dtype)  # (B,c)
        offset = norm.bias.to(mean.dtype) - mean.repeat_interleave(each, 1) * gain
        gain, offset = gain[..., None, None].to(dtype), offset[..., None, None].to(dtype)
        return lambda piece: torch.addcmul(offset, piece, gain)


def normalised(x: Rows, norm: nn.GroupNorm, step: int) -> Change:
    """Group normalisation by the statistics of all rows."""
    statistics = Statistics(norm)
    for top, bottom in strips(x.height, step):
        statistics.add(x.read(top, bottom))
    return statistics.change(x.dtype)


def convolve(
    x: Rows,
    conv: nn.Conv2d,
    values: int,
    *,
    before: Change = lambda piece: piece,
    enlarge: int = 1,
    padding: tuple[int, int, int, int] | None = None,
    exact: bool = False,
) -> Rows:
    """conv(before(x)) strip by strip.

    Args:
        values: of a strip, at most.
        before: what happens to every position first; the convolution's zero padding comes after it.
        enlarge: nearest-neighbour enlargement before the convolution.
        padding: left, right, top, bottom, where it is not the convolution's own.
        exact: keep the result in the model's precision.
    """
    own = cast(tuple[int, int], conv.padding)
    left, right, above, below = padding or (own[1], own[1], own[0], own[0])
    stride, kernel = conv.stride[0], conv.kernel_size[0]
    height, width = x.height * enlarge, x.data.shape[3] * enlarge
    size = ((height + above + below - kernel) // stride + 1, (width + left + right - kernel) // stride + 1)
    target = Rows(len(x.data), conv.out_channels, *size, like=x.like(), exact=exact)
    for top, bottom in strips(size[0], rows_of(values, max(conv.in_channels, conv.out_channels), width) // stride):
        first, last = top * stride - above, (bottom - 1) * stride - above + kernel  # rows of the enlarged input
        inside, beyond = max(first, 0), min(last, height)
        piece = before(x.read(inside // enlarge, -(-beyond // enlarge)))
        if enlarge > 1:
            piece = F.interpolate(piece, scale_factor=float(enlarge), mode="nearest")
            skip = inside - inside // enlarge * enlarge
            piece = piece[:, :, skip : skip + beyond - inside]
        piece = F.pad(piece, (left, right, inside - first, last - beyond))
        target.write(top, F.conv2d(piece, conv.weight, conv.bias, stride=conv.stride))
    return target


def same(piece: Tensor, conv: nn.Conv2d, above: bool, below: bool) -> Tensor:
    """Apply a 3x3 convolution to a piece, with rows of zeros where the image ends."""
    if above or below:
        piece = F.pad(piece, (0, 0, int(above), int(below)))
    return F.conv2d(piece, conv.weight, conv.bias, padding=(0, 1))


def residual(x: Rows, block: Any, values: int) -> Rows:
    """Apply a ResnetBlock2D without time embedding, in place of `x` where channels allow it."""
    act, height, channels = block.nonlinearity, x.height, block.conv2.out_channels
    step = rows_of(values, max(x.data.shape[1], channels), x.data.shape[3])
    first = normalised(x, block.norm1, step)

    def hidden(piece: Tensor, above: bool, below: bool) -> Tensor:
        return same(act(first(piece)), block.conv1, above, below)

    statistics = Statistics(block.norm2)
    for top, bottom in strips(height, step):
        piece = x.read(max(top - 1, 0), min(bottom + 1, height))
        statistics.add(hidden(piece, top == 0, bottom == height))
    second = statistics.change(x.dtype)

    batch, before, _, width = x.data.shape
    out = x.first(channels) if channels <= before else Rows(batch, channels, height, width, like=x.like())
    passed = x.like().new_empty(batch, before, 0, width)  # two rows of x that are written over
    for top, bottom in strips(height, step):
        piece = torch.cat([passed, x.read(top, min(bottom + 2, height))], dim=2)
        start = top - passed.shape[2]  # the piece's first row
        middle = hidden(piece, start == 0, bottom + 1 >= height)  # rows top-1 to bottom, as far as there are
        above = act(second(middle))
        own = piece[:, :, top - start : bottom - start]
        passed = piece[:, :, bottom - 2 - start : bottom - start].clone()
        if block.conv_shortcut is not None:
            own = block.conv_shortcut(own)
        out.write(top, own + same(above, block.conv2, top == 0, bottom == height))
    return out


def attend(x: Rows, attention: Attention, values: int) -> None:
    """Apply self-attention in place, with queries strip by strip and keys and values whole."""
    layer = cast(Any, attention)
    batch, channels, height, width = x.data.shape
    step = rows_of(values, channels, width)
    norm = normalised(x, layer.group_norm, step)

    def tokens(piece: Tensor) -> Tensor:
        return norm(piece).flatten(2).transpose(1, 2)  # (B,L,c)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # (B,H,L,d)

    key, value = (x.like().new_empty(batch, height * width, layer.inner_dim) for _ in range(2))
    for top, bottom in strips(height, step):
        piece = tokens(x.read(top, bottom))
        key[:, top * width : bottom * width] = layer.to_k(piece)
        value[:, top * width : bottom * width] = layer.to_v(piece)
    for top, bottom in strips(height, step):
        piece = x.read(top, bottom)
        mixed = F.scaled_dot_product_attention(heads(layer.to_q(tokens(piece))), heads(key), heads(value))
        added = layer.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (-1, width))
        x.write(top, (piece + added) / layer.rescale_output_factor)


def middle(x: Rows, block: Any, values: int) -> Rows:
    """Compute the block on the smallest grid."""
    attentions = [attention for attention in block.attentions if attention is not None]
    if not all(type(a) is Attention and a.group_norm is not None and a.residual_connection for a in attentions):
        return Rows.of(block(x.whole()), rows_of(values, x.data.shape[1], x.data.shape[3]))
    x = residual(x, block.resnets[0], values)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            attend(x, attention, values)
        x = residual(x, resnet, values)
    return x


@contextmanager
def weights_at_hand(network: nn.Module) -> Iterator[None]:
    """Hold weights that accelerate keeps elsewhere where their layers compute.

    Strips read them without the calls that would bring them under sequential offload.
    """
    kept = [module for module in network.modules() if hasattr(module, "_hf_hook")]
    for module in kept:
        cast(ModelHook, module._hf_hook).pre_forward(module)
    try:
        yield
    finally:
        for module in kept:
            cast(ModelHook, module._hf_hook).post_forward(module, None)


def decode_by_rows(decoder: Decoder, latents: Tensor, pixels: int) -> Tensor:
    """Run a diffusers KL decoder: latents (B,c,h,w) -> (B,3,H,W).

    Args:
        pixels: positions of a strip at full resolution, at most; elsewhere a strip has as many values.
    """
    with weights_at_hand(decoder):
        return _decoded(cast(Any, decoder), latents, pixels)


def _decoded(network: Any, latents: Tensor, pixels: int) -> Tensor:
    values = pixels * network.conv_norm_out.num_channels
    features = network.conv_in(latents)
    x = Rows.of(features, rows_of(values, *features.shape[1::2]))
    del features
    x = middle(x, network.mid_block, values)
    for block in network.up_blocks:
        if type(block) is not UpDecoderBlock2D:  # attention sees the whole picture
            x = Rows.of(block(x.whole()), rows_of(values, *x.data.shape[1::2]))
            continue
        stage = cast(Any, block)
        for resnet in stage.resnets:
            x = residual(x, resnet, values)
        for up in stage.upsamplers or []:
            x.data = x.data.clone()  # lets go of the wider activation that it took the place of
            x = convolve(x, up.conv, values, enlarge=2)
    norm = normalised(x, network.conv_norm_out, rows_of(values, *x.data.shape[1::2]))
    return convolve(x, network.conv_out, values, before=lambda p: network.conv_act(norm(p)), exact=True).whole()


def encode_by_rows(encoder: Encoder, images: Tensor, pixels: int) -> Tensor:
    """Return the last layer's output (B,c,h,w) of a diffusers KL encoder for images (B,3,H,W)."""
    with weights_at_hand(encoder):
        return _encoded(cast(Any, encoder), images, pixels)


def _encoded(network: Any, images: Tensor, pixels: int) -> Tensor:
    values = pixels * network.conv_in.out_channels
    x = convolve(Rows.around(images), network.conv_in, values)
    for block in network.down_blocks:
        if type(block) is not DownEncoderBlock2D:
            x = Rows.of(block(x.whole()), rows_of(values, *x.data.shape[1::2]))
            continue
        stage = cast(Any, block)
        for resnet in stage.resnets:
            x = residual(x, resnet, values)
        for down in stage.downsamplers or []:
            uneven = (0, 1, 0, 1) if down.padding == 0 else None
            x = convolve(x, down.conv, values, padding=uneven)
    x = middle(x, network.mid_block, values)
    return last_layer(x, network, values)


def last_layer(x: Rows, network: Any, values: int) -> Tensor:
    """Apply an encoder's last layer to strips with one row of its output more on each side."""
    layer, step = network.conv_out, rows_of(values, *x.data.shape[1::2])
    norm = normalised(x, network.conv_norm_out, step)
    factor = layer.scale if isinstance(layer, DetailDown) else 1
    parts = []
    for top, bottom in strips(x.height // factor, max(1, step // factor)):
        above, below = min(top, 1), min(x.height // factor - bottom, 1)
        piece = x.read((top - above) * factor, (bottom + below) * factor)
        parts.append(layer(network.conv_act(norm(piece)))[:, :, above : above + bottom - top])
    return torch.cat(parts, dim=2)


def rows_of(values: int, channels: int, width: int) -> int:
    """Return the rows of a strip of at most this many values, and 8 at least."""
    return max(8, values // (channels * width))
