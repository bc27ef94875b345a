"""Decoders of the base channels alone: the base's own, a tiny one, or a linear one."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.vae.base import autoencoder_class, autoencoder_family, base_channels, base_statistics
from davae.vae.frames import frames_of

RIDGE = 1e-3  # of the features' mean square
ROWS = 6  # equations per unknown of the fit


class BaseDecoder(nn.Module):
    """Decoder of the latents of an original model, as an optional part of a DetailVAE.

    Args:
        class_name, config: diffusers class and config of an autoencoder for the base's latents.
        raw: whether it decodes raw latents, as the base's own decoder does; the tiny ones (TAESD) decode latents as the
            transformer sees them, after their own scale and shift.
    """

    def __init__(self, class_name: str, config: dict[str, Any], raw: bool):
        super().__init__()
        family = autoencoder_family(class_name)
        source = autoencoder_class(class_name).from_config(config)
        self.class_name, self.raw = class_name, raw
        self.frames = frames_of(class_name, source.config)
        self.channels = base_channels(source.config, class_name)
        self.decoder = source.decoder
        quant = source.post_quant_conv if family.quant else None
        self.post_quant_conv = nn.Identity() if quant is None else quant
        self.mean, self.std = (0.0, 1.0) if raw else tuple(values[0] for values in base_statistics(source.config))
        self.requires_grad_(False)
        self.train(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B,3,H,W) of the base's size from latents (B,C,h,w), raw where `raw` is set."""
        scaled = latents * self.std + self.mean
        return self.frames.decode(
            lambda x, **options: self.decoder(self.post_quant_conv(x), **options), scaled
        )  # (B,3,H,W)


class LinearDecoder(nn.Module):
    """One convolution from raw base latents to pixels: a preview for a thousandth of a step.

    I = shuffle(W * z + b), with a 3x3 kernel W of 3 f^2 outputs for each latent position.

    Args:
        weight: (3 f^2,C,3,3).
        bias: (3 f^2,).
    """

    raw = True

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.factor = round((len(weight) // 3) ** 0.5)
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw base latents (B,C,h,w) -> images (B,3,f h,f w)."""
        padded = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        pixels = F.conv2d(padded, self.weight, self.bias)  # (B,3f^2,h,w)
        return F.pixel_shuffle(pixels, self.factor)


def neighbourhoods(latents: Tensor) -> Tensor:
    """Return the 3x3 neighbourhood of each position (B,hw,9C), float64, of latents (B,C,h,w)."""
    padded = F.pad(latents.double().cpu(), (1, 1, 1, 1), mode="replicate")
    return F.unfold(padded, 3).transpose(1, 2)


def solve_ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Return W (p,q) with the least |x W - y|^2 + r |W|^2, for centred x (N,p) and y (N,q).

    Args:
        ridge: r, as a share of the mean square of x's columns.
    """
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def fit_linear(latents: Tensor, images: Tensor) -> LinearDecoder:
    """Fit a linear decoder to pairs of latents and images by least squares.

    Args:
        latents: raw base latents (B,C,h,w).
        images: their images (B,3,f h,f w) in [-1,1].
    """
    factor = images.shape[-1] // latents.shape[-1]
    features = neighbourhoods(latents).flatten(0, 1)  # (Bhw,9C)
    targets = F.pixel_unshuffle(images.double().cpu(), factor).flatten(2).transpose(1, 2).flatten(0, 1)  # (Bhw,3f^2)
    mean, level = features.mean(0), targets.mean(0)
    solution = solve_ridge(features - mean, targets - level, RIDGE)  # (9C,3f^2)
    weight = solution.T.unflatten(1, (latents.shape[1], 3, 3))
    return LinearDecoder(weight.float(), (level - mean @ solution).float())


def dead_leaves(count: int, side: int, seed: int = 0) -> Tensor:
    """Return images (B,3,side,side) in [-1,1] of random discs that cover each other."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def colours() -> Tensor:
        grey = uniform(count, 1, 1, 1) < 0.3  # paper, outlines and shadows are
        mixed = uniform(count, 3, 1, 1) * 4 - 2
        return torch.where(grey, mixed[:, :1], mixed).clamp(-1, 1)  # as often at its limits as between them

    axis = (torch.arange(side) + 0.5) / side
    images = colours().expand(-1, -1, side, side)
    for _ in range(40):
        centre, colour = uniform(2, count, 1, 1, 1), colours()
        radius = 0.02 / (0.05 + uniform(count, 1, 1, 1))  # a density of about 1/r^2
        slope = (uniform(count, 3, 1, 1) - 0.5) * (uniform(count, 1, 1, 1) < 0.5) * axis
        inside = (axis[:, None] - centre[0]) ** 2 + (axis - centre[1]) ** 2 < radius**2
        images = torch.where(inside, (colour + slope).clamp(-1, 1), images)
    return images


_fitted: weakref.WeakKeyDictionary[nn.Module, LinearDecoder] = weakref.WeakKeyDictionary()


@torch.no_grad()
def linear_decoder(vae: Any) -> LinearDecoder:
    """Return the linear decoder of a DetailVAE's base latents, fitted on first use.

    Args:
        vae: a DetailVAE; only its base encoder is used.
    """
    if vae not in _fitted:
        channels, factor = vae.layout.base_channels, vae.spatial_factor // vae.layout.scale
        count = max(8, -(-ROWS * (9 * channels + 1) // 16**2))
        images = dead_leaves(count, 16 * factor)
        parameter = next(vae.parameters())
        z = torch.cat([vae.encode_base(one.to(parameter.device, parameter.dtype)) for one in images.split(8)])
        blank = z.new_zeros(len(z), vae.layout.detail_channels, *z.shape[-2:])
        _fitted[vae] = fit_linear(vae.base_latents(vae.layout.join(z, blank)), images)
    return cast(LinearDecoder, _fitted[vae])
