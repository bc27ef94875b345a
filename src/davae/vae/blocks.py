"""Downsampling of I_hr to I, and blocks between the latent grid and the base's feature grid."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.vae.base import AutoencoderFamily, layer_path

Downsample = Literal["antialias", "bicubic"]


def downsample(images: Tensor, scale: int, mode: Downsample = "antialias") -> Tensor:
    """Return I (B,3,H,W) of I_hr (B,3,s*H,s*W), antialiased unless mode is `bicubic`."""
    size = (images.shape[-2] // scale, images.shape[-1] // scale)
    dtype = images.dtype if images.dtype in (torch.float32, torch.float64) else torch.float32
    small = F.interpolate(images.to(dtype), size, mode="bicubic", align_corners=False, antialias=mode == "antialias")
    return small.to(images.dtype)


class DetailDown(nn.Module):
    """Map of features (B,c,s*h,s*w) to moments (B,out,h,w) by a convolution and pixel-unshuffle.

    The shortcut unshuffles the features and averages channels in groups. Where they do not divide into groups, or where it is
    to be `learned`, it is a 1x1 convolution that starts at zero. A video encoder's only frame, (B,c,1,s*h,s*w), stays one.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, learned: bool = False):
        super().__init__()
        self.out_channels, self.scale = out_channels, scale
        # where s*s does not divide the outputs, the surplus of the last convolution channel is dropped
        self.conv = nn.Conv2d(in_channels, -(-out_channels // scale**2), 3, padding=1)
        self.shortcut: nn.Conv2d | None = None
        if learned or in_channels * scale**2 % out_channels:
            self.shortcut = nn.Conv2d(in_channels * scale**2, out_channels, 1, bias=False)
            nn.init.zeros_(self.shortcut.weight)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 5:
            return self(features[:, :, 0])[:, :, None]
        main = F.pixel_unshuffle(self.conv(features), self.scale)[:, : self.out_channels]  # (B,out,h,w)
        folded = F.pixel_unshuffle(features, self.scale)  # (B,c*s*s,h,w)
        if self.shortcut is not None:
            return main + self.shortcut(folded)
        return main + folded.unflatten(1, (self.out_channels, -1)).mean(2)


class DetailUp(nn.Module):
    """Map of latents (B,in,h,w) to features (B,out,s*h,s*w) by a convolution and pixel-shuffle.

    The shortcut repeats channels and shuffles; where they do not divide, or where it is to be `learned`, it is a 1x1
    convolution that starts at zero. A video decoder's only frame, (B,in,1,h,w), stays one.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, learned: bool = False):
        super().__init__()
        self.in_channels, self.out_channels, self.scale = in_channels, out_channels, scale
        self.conv = nn.Conv2d(in_channels, out_channels * scale**2, 3, padding=1)
        self.shortcut: nn.Conv2d | None = None
        if learned or out_channels * scale**2 % in_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels * scale**2, 1, bias=False)
            nn.init.zeros_(self.shortcut.weight)

    def forward(self, latents: Tensor) -> Tensor:
        if latents.ndim == 5:
            return self(latents[:, :, 0])[:, :, None]
        main = self.conv(latents)  # (B,out*s*s,h,w)
        if self.shortcut is not None:
            side = self.shortcut(latents)
        else:
            side = latents.repeat_interleave(self.conv.out_channels // self.in_channels, dim=1)
        return F.pixel_shuffle(main + side, self.scale)  # (B,out,s*h,s*w)


def replace_ends(
    encoder: nn.Module, decoder: nn.Module, family: AutoencoderFamily, layout: LatentLayout, learned_shortcuts: bool
) -> tuple[str, str]:
    """Replace a base autoencoder's last and first convolution by the detail latent's blocks.

    Args:
        encoder, decoder: copies of the base autoencoder's networks; changed in place.
        family: the base autoencoder's row.
        layout: channels and scale of the latents.
        learned_shortcuts: the blocks' shortcuts have weights of their own even where channels divide.

    Returns:
        Paths of the encoder's last and the decoder's first block.
    """
    last, first = layer_path(encoder, family.last), layer_path(decoder, family.first)
    width: Any = encoder.get_submodule(last).in_channels
    encoder.set_submodule(last, DetailDown(width, 2 * layout.detail_channels, layout.scale, learned_shortcuts))
    width = decoder.get_submodule(first).out_channels
    decoder.set_submodule(first, DetailUp(layout.channels, width, layout.scale, learned_shortcuts))
    if family.shortcut is not None:  # the new layers have their own
        for module, name in zip((encoder, decoder), family.shortcut, strict=True):
            setattr(module, name, False)
    return last, first
