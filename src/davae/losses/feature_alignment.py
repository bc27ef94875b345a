"""Alignment of two latents by their features in a transformer (GRACE, Eq. 8-9)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsampled_tokens(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Return tokens (B,L,w) of one grid interpolated to another, interp of Eq. 8.

    GRACE interpolates trilinearly over time and space; an image has no time, so that it is bilinear.

    Args:
        tokens: in row order, L = rows * columns of `grid`.
        grid, target: rows and columns.

    Returns:
        (B,L',w), L' = rows * columns of `target`.
    """
    maps = tokens.transpose(1, 2).unflatten(2, grid)  # (B,w,rows,columns)
    return F.interpolate(maps, target, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def feature_alignment_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return L_align of GRACE, Eq. 9: sum over layers of 1 - the mean cosine of the tokens.

    Args:
        features, targets: (B,L,w) of each layer; no gradient flows to the targets.

    Returns:
        A scalar in [0, 2 * layers].
    """
    cosines = [
        F.cosine_similarity(own.float(), target.detach().float(), dim=-1).mean()
        for own, target in zip(features, targets, strict=True)
    ]
    return sum((1 - cosine for cosine in cosines), start=cosines[0].new_zeros(()))
