"""Codec: images to latents and back by one autoencoder, in the scale that transformers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from davae.latent import LatentStatistics
from davae.vae.base import autoencoder_family, base_channels, base_statistics, packed_statistics, spatial_factor
from davae.vae.frames import decode_latents, encode_mode

DETAIL = "DetailVAE"  # by name: a self-contained folder brings a class of its own


class Codec:
    """Images to latents and back by a DetailVAE or any base autoencoder, video ones included.

    Raw latents are what the encoder returns. Normalised latents are what the transformer takes.

    Args:
        vae: the autoencoder, whose weights, device and precision are used as they are at each call.
    """

    def __init__(self, vae: Any):
        self.vae = vae
        self._detail = type(vae).__name__ == DETAIL

    @property
    def factor(self) -> int:
        """Pixels per latent position, each way."""
        return latent_shape(self.vae.config, type(self.vae).__name__)[0]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return latent_shape(self.vae.config, type(self.vae).__name__)[1]

    @property
    def statistics(self) -> LatentStatistics:
        """Mean and std of raw latents, (1,c,1,1), or (1,c,2,2) where pipelines pack positions."""
        if self._detail:
            return self.vae.statistics
        side = autoencoder_family(type(self.vae).__name__).cell
        mean, std = packed_statistics(self.vae) if side > 1 else base_statistics(self.vae.config)
        return LatentStatistics(torch.tensor(mean).view(1, -1, side, side), torch.tensor(std).view(1, -1, side, side))

    def normalise(self, latents: Tensor) -> Tensor:
        """Return the normalised latents of raw ones, (B,c,h,w)."""
        return self.statistics.to(latents.device).normalise(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return the raw latents of normalised ones, (B,c,h,w)."""
        return self.statistics.to(latents.device).denormalise(latents)

    def encode_raw(self, images: Tensor) -> Tensor:
        """Return raw latents (B,c,h,w) without noise of images (B,3,H,W) in [-1,1]."""
        if not self._detail:
            return encode_mode(self.vae, images)
        raw = self.vae.encode_raw(images)
        return self.vae.layout.join(raw.z, raw.mean)

    def encode(self, images: Tensor) -> Tensor:
        """Return normalised latents (B,c,h,w) without noise of images (B,3,H,W) in [-1,1]."""
        latents = encode_mode(self.vae, images)
        return latents if self._detail else self.normalise(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B,3,H,W) in about [-1,1] of normalised latents (B,c,h,w)."""
        raw = latents if self._detail else self.denormalise(latents)
        return decode_latents(self.vae, raw.to(self.vae.dtype))


def latent_shape(config: Any, class_name: str) -> tuple[int, int]:
    """Return the pixels per latent position and the channels of an autoencoder's latents.

    Args:
        config: the autoencoder's config.
        class_name: its class.

    Raises:
        ValueError: a class that is not supported.
    """
    channels = int(config["latent_channels"]) if class_name == DETAIL else base_channels(config, class_name)
    return spatial_factor(config, class_name), channels
