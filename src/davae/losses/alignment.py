"""Detail alignment: the grouped channel mean of z_d stays close to z (Eq. 3-4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_mean(z_d: Tensor, base_channels: int) -> Tensor:
    """Return Proj of Eq. 4: the mean of detail channels i*r ... i*r + r-1 for each i, r = D/C.

    Args:
        z_d: detail latent (B,D,h,w).
        base_channels: C; must divide D.

    Returns:
        (B,C,h,w).

    Raises:
        ValueError: C does not divide D.
    """
    batch, detail_channels, *space = z_d.shape
    if base_channels < 1 or detail_channels % base_channels:
        raise ValueError(f"detail latent has {detail_channels} channels, not a multiple of {base_channels}")
    group_size = detail_channels // base_channels
    return z_d.reshape(batch, base_channels, group_size, *space).mean(dim=2)  # (B,C,r,h,w) -> (B,C,h,w)


def alignment_loss(z_d: Tensor, z: Tensor) -> Tensor:
    """Return L_align of Eq. 3: mean squared error of Proj(z_d) and z, without gradient of z."""
    return F.mse_loss(group_mean(z_d, z.shape[1]), z.detach())
