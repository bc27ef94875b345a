"""The part of a DetailVAE that encodes and decodes its base's latents on their own."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.autoencoders.vae import Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.latent import LatentLayout, LatentStatistics
from davae.vae.base import autoencoder_family, base_channels
from davae.vae.base_decoder import BaseDecoder
from davae.vae.frames import Frames, only_frame
from davae.vae.strips import encode_by_rows
from davae.vae.tiling import Tiling
from davae.vae.whole_layers import encode_in_tiles


class BasePart:
    """Methods of a DetailVAE on its base channels."""

    layout: LatentLayout
    frames: Frames
    config: Any
    spatial_factor: int
    tiling: Tiling
    use_tiling: bool
    mean: Tensor
    std: Tensor
    base_encoder: nn.Module
    base_quant_conv: nn.Module
    base_decoder: BaseDecoder | None

    def base_latents(self, latents: Tensor) -> Tensor:
        """Return the raw base channels, as the original model's autoencoder decodes them.

        Args:
            latents: normalised z_hr (B,C+D,h,w), or one frame (B,C+D,1,h,w); the base alone (B,C,h,w) is taken as well.

        Returns:
            z (B,C,h,w).

        Raises:
            ValueError: another number of channels.
        """
        latents = only_frame(latents) if latents.ndim == 5 else latents
        z = latents if latents.shape[1] == self.layout.base_channels else self.layout.split(latents)[0]
        return self._base_statistics(z).denormalise(z)  # (B,C,h,w)

    def _base_statistics(self, z: Tensor) -> LatentStatistics:
        mean, std = (self.layout.split(part)[0].to(z) for part in (self.mean, self.std))
        return LatentStatistics(mean, std)

    @apply_forward_hook
    def encode_base(self, images: Tensor) -> Tensor:
        """Return the normalised base latent z (B,C,h,w) of images of the base's size.

        Args:
            images: I (B,3,H,W) in [-1,1]; H and W divisible by the base's factor.

        Raises:
            ValueError: a size that is not divisible.
        """
        factor = self.spatial_factor // self.layout.scale
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(f"images are {width}x{height}; both sides must be divisible by {factor}")
        tile, encoder = self.tiling.tile // self.layout.scale, self.base_encoder

        def encode(x: Tensor) -> Tensor:
            if not self.use_tiling or max(height, width) <= tile:
                return encoder(x)
            if isinstance(encoder, Encoder):
                return encode_by_rows(encoder, x, tile**2)
            patch = self.frames.patch
            return encode_in_tiles(encoder, x, Tiling(tile // patch, self.tiling.overlap), factor // patch)

        with torch.no_grad():
            moments = self.frames.encode(lambda x: self.base_quant_conv(encode(x)), images)
        z = moments[:, : self.layout.base_channels]  # mode
        return self._base_statistics(z).normalise(z)

    @apply_forward_hook
    def decode_base(self, latents: Tensor) -> Tensor:
        """Return images (B,3,H,W) of the base's size from the base channels, by the base decoder.

        Args:
            latents: normalised z_hr (B,C+D,h,w), or z (B,C,h,w).

        Raises:
            ValueError: this autoencoder has no base decoder; `attach_base_decoder` gives it one.
        """
        decoder = self.base_decoder
        if decoder is None:
            raise ValueError("this DetailVAE has no base decoder; attach_base_decoder gives it one")
        if decoder.raw:
            return decoder(self.base_latents(latents))
        return decoder(latents[:, : self.layout.base_channels])

    def attach_base_decoder(self, autoencoder: Any) -> None:
        """Copy the decoder of the base's autoencoder, or of a tiny one, into this DetailVAE.

        It is saved and loaded with the other weights, and neither `encode` nor `decode` use it.

        Raises:
            ValueError: an autoencoder of another number of channels.
        """
        name = type(autoencoder).__name__
        own = name == self.config["base_class"]
        channels = base_channels(autoencoder.config, name)
        if channels != self.layout.base_channels:
            raise ValueError(
                f"base decoder: a {name} of {channels} channels, the base has {self.layout.base_channels}; "
                "use an autoencoder of the same latents"
            )
        config = {key: value for key, value in dict(autoencoder.config).items() if not key.startswith("_")}
        cells = autoencoder_family(self.config["base_class"]).cell > 1  # their tiny autoencoders decode raw latents
        entry = {"class_name": name, "config": config, "raw": own or cells}
        decoder = BaseDecoder(**entry)
        weights = cast(nn.Module, autoencoder).state_dict()
        decoder.load_state_dict({key: weights[key] for key in decoder.state_dict()})
        parameter = next(cast(nn.Module, self).parameters())
        self.base_decoder = decoder.to(parameter.device, parameter.dtype)
        self.register_to_config(base_decoder_config=entry)  # type: ignore[attr-defined]
