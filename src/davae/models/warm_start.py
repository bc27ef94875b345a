"""How a DetailVAE's new layers begin, so that it starts as its base autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.models.resample import DetailDown, DetailUp


def warm_start_up(up: DetailUp, weight: Tensor, bias: Tensor, layout: LatentLayout) -> None:
    """Make DetailUp([z, 0]) equal a 3x3 convolution of z enlarged s times (nearest), away from the border's zero padding.

    weight (width,C,3,3), bias (width,): the base decoder's first convolution.

    A 3x3 convolution on the enlarged grid reads, at sub-position a, the coarse neighbours floor((a+k-1)/s): its taps
    collapse onto a coarse 3x3 kernel. The shortcut's share is subtracted. Detail columns keep their random start.
    """
    scale, width = layout.scale, len(weight)
    with torch.no_grad():
        kernel = up.conv.weight.unflatten(0, (width, scale, scale))  # view (c,s,s,C+D,3,3)
        z, _ = layout.split(kernel.flatten(0, 2))  # view (c*s*s,C,3,3); the detail columns stay
        z = z.unflatten(0, (width, scale, scale))
        z.zero_()
        for a in range(scale):
            for b in range(scale):
                for k in range(3):
                    for m in range(3):
                        row, column = (a + k - 1) // scale + 1, (b + m - 1) // scale + 1
                        z[:, a, b, :, row, column] += weight[:, :, k, m]
        if up.shortcut is None:
            repeats = up.conv.out_channels // layout.channels
            for out in range(up.conv.out_channels):
                source = out // repeats
                if source < layout.base_channels:
                    up.conv.weight[out, source, 1, 1] -= 1.0
        assert up.conv.bias is not None
        up.conv.bias.copy_(bias.repeat_interleave(scale**2))


def narrow_posterior(down: DetailDown, layout: LatentLayout, logvar: float = -4.0) -> None:
    """Start z_d's posterior near sigma = exp(logvar/2) = 0.14: unit noise would drown the new latent at first."""
    first = -(-layout.detail_channels // layout.scale**2)  # first convolution channel that feeds log-variances only
    assert down.conv.bias is not None
    with torch.no_grad():
        down.conv.bias[first:] = logvar


def load_all_but(module: nn.Module, state: dict[str, Tensor], new: str) -> None:
    """Load `state`, which must hold everything except the new parts named by the prefix."""
    result = module.load_state_dict(state, strict=False)
    odd = [name for name in result.missing_keys if not name.startswith(new)] + result.unexpected_keys
    assert not odd, f"weights do not fit: {odd}"
