"""Latents in the shapes that pipelines use between steps, and as (B,c,h,w)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def unpack_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """Return latents of any pipeline as (B,c,h,w).

    Args:
        latents: (B,c,h,w); one frame (B,c,1,h,w); 2x2 packed positions (B,hw/4,4c) or, on their grid, (B,4c,h/2,w/2), each
            (c,2,2); or a token a position (B,hw,c).
        height, width: h and w.

    Raises:
        ValueError: none of these.
    """
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    if latents.ndim == 4 and tuple(latents.shape[-2:]) == (height, width):
        return latents
    if latents.ndim == 4 and tuple(latents.shape[-2:]) == (height // 2, width // 2):
        return F.pixel_shuffle(latents, 2)
    if latents.ndim == 3 and latents.shape[1] == height * width:
        return latents.transpose(1, 2).unflatten(2, (height, width))
    if latents.ndim == 3 and latents.shape[1] * 4 == height * width:
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)
    raise ValueError(f"latents of shape {tuple(latents.shape)} are not those of {height}x{width} positions")


def pack_like(latents: Tensor, like: Tensor) -> Tensor:
    """Return latents (B,c,h,w) in the shape, precision and device of a pipeline's own `like`."""
    height, width = latents.shape[-2:]
    if like.ndim == 5:
        packed = latents[:, :, None]
    elif like.ndim == 4:
        packed = latents if like.shape[-1] == width else F.pixel_unshuffle(latents, 2)
    elif like.shape[1] == height * width:
        packed = latents.flatten(2).transpose(1, 2)
    else:
        packed = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    return packed.to(like).contiguous()


def latent_size(latents: Tensor, channels: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return h and w of a pipeline's latents with `channels` channels.

    Args:
        latents: of any pipeline.
        channels: c.
        size: h and w where they are known; without them, a list of tokens is taken for a square.

    Raises:
        ValueError: tokens that are not a square's, without a size.
    """
    if size is not None:
        return size
    if latents.ndim > 3:
        factor = 2 if latents.shape[1] == 4 * channels else 1
        return latents.shape[-2] * factor, latents.shape[-1] * factor
    side = round(latents.shape[1] ** 0.5)
    if side * side != latents.shape[1]:
        raise ValueError(f"{latents.shape[1]} tokens are not a square; give height and width in pixels")
    return (side, side) if latents.shape[2] == channels else (2 * side, 2 * side)
