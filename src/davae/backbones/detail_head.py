"""Detail rows of a velocity model's output: linear skip and x0 prediction."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from davae.backbones.detail_time import base_and_detail_time
from davae.backbones.linear_gaussian import LinearGaussian
from davae.latent import LatentLayout

DetailPrediction = Literal["velocity", "x0"]
SMALLEST_LEVEL = 0.05  # of the noise by which an error of x_0 is divided; that of arXiv 2511.13720


def x0_level(sigma: Tensor) -> Tensor:
    """Return the noise level by which x0 prediction divides, at least `SMALLEST_LEVEL`.

    x_s = (1 - s) x + s n gives n = (x_s - (1 - s) x) / s, and with it the velocity

        n - x = (x_s - x) / s,

    so that an error e of x is one of e / s of the velocity, without bound as s falls to 0. "Back to Basics" (arXiv
    2511.13720, whose model predicts x_0 under a velocity loss as well) divides by max(s, 0.05). This biases nothing:
    n - x = (x_s - h) / max(s, 0.05) holds for h = x_s - max(s, 0.05) (n - x), which is x where s >= 0.05, and below it the
    state on the same straight path that has 0.05 less noise.

    Args:
        sigma: s in [0,1], of any shape.
    """
    return sigma.clamp(min=SMALLEST_LEVEL)


class DetailHead(nn.Module):
    """Conversion of the detail rows that a head returns to a velocity.

    Base rows stay as they are.

    With o for the head's detail rows, y for x_t's, m for `x0_level` and L for the detail rows of `LinearGaussian`, the
    velocity n - x of the detail is

        -o          with neither option,
        L - o       with the linear skip,
        (y - o) / m with x0 prediction, o being x_0,
        L - o / m   with both, o being what is left of x_0: the skip's x_0 is h = y - m L.

    A new O' gives o = 0: the detail then starts at 0, at L, or at the velocity of x_0 = 0.

    Args:
        channels: C+D.
        base_channels: C.
        linear_skip: add what a linear Gaussian model of [z, z_d] predicts.
        prediction: what the head's detail rows are.
    """

    def __init__(
        self,
        channels: int,
        base_channels: int,
        linear_skip: bool = False,
        prediction: DetailPrediction = "velocity",
    ):
        super().__init__()
        if prediction not in ("velocity", "x0"):
            raise ValueError(f"the detail's prediction is '{prediction}'; use velocity or x0")
        self.layout = LatentLayout(base_channels, channels - base_channels)
        self.predicts_x0 = prediction == "x0"
        self.linear = LinearGaussian(channels) if linear_skip else None

    def forward(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity data - noise, in LightningDiT's convention.

        Args:
            output: the head's (B,C+D,h,w), the base rows a velocity data - noise.
            x_t: noised latents (B,C+D,h,w).
            t: (B,) in [0,1], 1 is data; (B,2) for base and detail.

        Returns:
            (B,C+D,h,w).
        """
        base, detail = self.layout.split(output)
        precision = torch.promote_types(x_t.dtype, torch.float32)
        with nullcontext() if x_t.is_meta else torch.autocast(x_t.device.type, enabled=False):
            x_t, sigma = x_t.to(precision), 1 - t.to(precision)
            detail = detail.to(precision)
            if self.predicts_x0:
                level = x0_level(base_and_detail_time(sigma)[1]).view(-1, 1, 1, 1)
                known = 0 if self.linear is not None else self.layout.split(x_t)[1]
                detail = (detail - known) / level
            if self.linear is not None:
                detail = detail - self.layout.split(self.linear(x_t, self._by_channel(sigma)))[1]
        return self.layout.join(base, detail.to(base.dtype))

    def _by_channel(self, sigma: Tensor) -> Tensor:
        """Return levels (B,) as they are, those of base and detail (B,2) for each channel (B,C+D)."""
        if sigma.ndim == 1:
            return sigma
        return self.layout.by_group(*(level.view(-1, 1, 1, 1) for level in sigma.unbind(1))).flatten(1)
