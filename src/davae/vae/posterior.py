"""Posterior and raw latents of a DetailVAE's encoders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from davae.latent import LatentLayout


class StructuredPosterior(DiagonalGaussianDistribution):
    """Normalised posterior of [z, z_d], (B,C+D,h,w): z is certain, z_d a diagonal Gaussian."""

    def __init__(self, parameters: Tensor, layout: LatentLayout):
        super().__init__(parameters)
        self.std, self.var = (self._certain_base(spread, layout) for spread in (self.std, self.var))

    @staticmethod
    def _certain_base(spread: Tensor, layout: LatentLayout) -> Tensor:
        z, z_d = layout.split(spread)
        return layout.join(torch.zeros_like(z), z_d)


@dataclass(frozen=True)
class RawLatents:
    """Before normalisation: z (B,C,h,w), and mean and log-variance of z_d (B,D,h,w)."""

    z: Tensor
    mean: Tensor
    logvar: Tensor
