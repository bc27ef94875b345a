"""Open a diffusers autoencoder, or a DetailVAE, from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from davae.vae.base import base_channels, base_statistics, spatial_factor
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import encode_mode

DETAIL = DetailVAE.__name__


def latent_shape(config: Any, class_name: str) -> tuple[int, int]:
    """(pixels per latent position each way, channels) of an autoencoder, told from its config.

    Raises:
        ValueError: a class that is not supported.
    """
    channels = int(config["latent_channels"]) if class_name == DETAIL else base_channels(config, class_name)
    return spatial_factor(config, class_name), channels


def encode_raw(vae: Any, images: Tensor) -> Tensor:
    """Latents without noise before any normalisation, a DetailVAE's too: (B,3,H,W) in [-1,1] -> (B,c,h,w)."""
    if not isinstance(vae, DetailVAE):
        return encode_mode(vae, images)
    raw = vae.encode_raw(images)
    return vae.layout.join(raw.z, raw.mean)


def raw_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(mean, std) of `encode_raw`, each (1,c,1,1), by which its transformers see the latents; of a DetailVAE over packed
    positions (1,c,2,2)."""
    if isinstance(vae, DetailVAE):
        return vae.mean, vae.std  # type: ignore[return-value]
    mean, std = base_statistics(vae.config)
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
