"""Start of a DetailVAE's new layers, so that it begins as its base autoencoder."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.vae.base import autoencoder_family, first_convolution, last_convolution, layer_path
from davae.vae.blocks import DetailDown, DetailUp

Start = Literal["enlarged", "unfolded"]  # what a new decoder makes pictures of: z alone, or z_d as well


def load_base_weights(vae: Any, base: Any, start: Start) -> None:
    """Load a base autoencoder's weights into a new DetailVAE, and start its new layers.

    Raises:
        ValueError: `unfolded` where D is not a multiple of s^2.
    """
    family = autoencoder_family(type(base).__name__)
    encoder = base.encoder.state_dict()
    vae.base_encoder.load_state_dict(encoder)
    if family.quant and base.quant_conv is not None:
        vae.base_quant_conv.load_state_dict(base.quant_conv.state_dict())
    last, first = layer_path(base.encoder, family.last), layer_path(base.decoder, family.first)
    blocks = {name: value for name, value in encoder.items() if not name.startswith(f"{last}.")}
    load_all_but(vae.detail_encoder, blocks, f"{last}.")
    blocks = {name: value for name, value in base.decoder.state_dict().items() if not name.startswith(f"{first}.")}
    load_all_but(vae.decoder, blocks, f"{first}.")
    down, up = vae.detail_encoder.get_submodule(last), vae.decoder.get_submodule(first)
    narrow_posterior(down, vae.layout)
    if start == "unfolded":
        unfold_down(down, *last_convolution(base, family), vae.layout)
        unfold_up(up, *first_convolution(base, family), vae.layout)
    else:
        warm_start_up(up, *first_convolution(base, family), vae.layout)


def warm_start_up(up: DetailUp, weight: Tensor, bias: Tensor, layout: LatentLayout) -> None:
    """Make DetailUp([z, 0]) equal a 3x3 convolution of z enlarged s times, inside the border.

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


def filter_shares(layout: LatentLayout) -> Tensor:
    """Return M (D/s^2,C), whose row k averages the base channels of filter k (Eq. 4).

    Filter k of DetailDown feeds z_d's channels k s^2 to (k+1) s^2 - 1, a sub-position each.

    Raises:
        ValueError: D is not a multiple of s^2.
    """
    cell = layout.scale**2
    if layout.detail_channels % cell:
        near = cell * layout.base_channels
        raise ValueError(
            f"'unfolded' needs detail_channels divisible by {cell} (scale squared), found "
            f"{layout.detail_channels}; use e.g. {near}, or 'enlarged'"
        )
    aligned = torch.arange(layout.detail_channels) // layout.group_size  # base channel of each channel of z_d
    return nn.functional.one_hot(aligned, layout.base_channels).double().unflatten(0, (-1, cell)).mean(1)


def unfold_down(down: DetailDown, weight: Tensor, bias: Tensor, layout: LatentLayout) -> None:
    """Start z_d's mean as M times the base latent of I_hr at each sub-position.

    weight (C,width,3,3), bias (C,): the base encoder's last convolution. D = s^2 C keeps that latent whole. The block's
    shortcut must be one that starts at zero.
    """
    assert down.shortcut is not None
    shares = filter_shares(layout).to(weight)
    with torch.no_grad():
        down.conv.weight[: len(shares)] = torch.einsum("kc,cihw->kihw", shares, weight)
        assert down.conv.bias is not None
        down.conv.bias[: len(shares)] = shares @ bias


def unfold_up(up: DetailUp, weight: Tensor, bias: Tensor, layout: LatentLayout) -> None:
    """Make DetailUp([z, z_d]) equal a 3x3 convolution of z' = z + M^+ (z_d - M z).

    z is enlarged s times, z_d at its sub-positions: z' is the base latent of I_hr as far as z_d contains it, and z
    elsewhere. D = s^2 C gives z' = z_d.

    weight (width,C,3,3), bias (width,): the base decoder's first convolution. The block's shortcut must start at zero.
    """
    assert up.shortcut is not None
    scale, width = layout.scale, len(weight)
    shares = filter_shares(layout)
    back = torch.linalg.pinv(shares)  # (C,K)
    rest = (torch.eye(layout.base_channels).double() - back @ shares).to(weight)  # (C,C)
    back = back.to(weight)
    with torch.no_grad():
        up.conv.weight.zero_()
        kernel = up.conv.weight.unflatten(0, (width, scale, scale))  # view (c,s,s,C+D,3,3)
        z, z_d = (part.unflatten(0, (width, scale, scale)) for part in layout.split(kernel.flatten(0, 2)))
        z_d = z_d.unflatten(3, (-1, scale, scale))  # view (c,s,s,K,s,s,3,3)
        for a, b, k, m in itertools.product(range(scale), range(scale), range(3), range(3)):
            (row, y), (column, x) = divmod(a + k - 1, scale), divmod(b + m - 1, scale)
            z[:, a, b, :, row + 1, column + 1] += weight[:, :, k, m] @ rest
            z_d[:, a, b, :, y, x, row + 1, column + 1] += weight[:, :, k, m] @ back
        assert up.conv.bias is not None
        up.conv.bias.copy_(bias.repeat_interleave(scale**2))


def narrow_posterior(down: DetailDown, layout: LatentLayout, logvar: float = -4.0) -> None:
    """Start z_d's posterior near sigma = exp(logvar/2) = 0.14, far below unit noise."""
    first = -(-layout.detail_channels // layout.scale**2)  # first convolution channel that feeds log-variances only
    assert down.conv.bias is not None
    with torch.no_grad():
        down.conv.bias[first:] = logvar


def load_all_but(module: nn.Module, state: dict[str, Tensor], new: str) -> None:
    """Load `state`, which must hold everything except the new parts named by the prefix."""
    result = module.load_state_dict(state, strict=False)
    odd = [name for name in result.missing_keys if not name.startswith(new)] + result.unexpected_keys
    assert not odd, f"weights do not fit: {odd}"
