"""Images through autoencoders of videos, as one frame, maybe in patches or with alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor

from davae.vae.base import autoencoder_family


@dataclass(frozen=True)
class Frames:
    """Form in which the networks of a base autoencoder take an image.

    Attributes:
        video: whether they take frames, (B,c,t,h,w), or images as they are.
        channels: of a frame; a fourth one is alpha.
        patch: pixels per side that are packed into channels before the encoder and unpacked after the decoder.
        first_chunk: whether the decoder takes an option that marks the first frame.
    """

    video: bool
    channels: int = 3
    patch: int = 1
    first_chunk: bool = False

    def wrap(self, images: Tensor) -> Tensor:
        """Return images (B,3,H,W) as frames (B,channels,1,H,W), alpha 1, for video networks alone."""
        if not self.video:
            return images
        missing = self.channels - images.shape[1]
        return F.pad(images, (0, 0, 0, 0, 0, missing), value=1.0)[:, :, None]

    def encode(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return an encoder's (B,c,h,w) for images (B,3,H,W)."""
        if not self.video:
            return network(images)
        return network(patchify(self.wrap(images), self.patch))[:, :, 0]

    def decode(self, network: Callable[..., Tensor], latents: Tensor) -> Tensor:
        """Return a decoder's images (B,3,H,W) for latents (B,c,h,w)."""
        if not self.video:
            return network(latents)
        options = {"first_chunk": True} if self.first_chunk else {}
        return unpatchify(network(latents[:, :, None], **options), self.patch)[:, :3, 0]


def frames_of(class_name: str, config: Any) -> Frames:
    """Return the form in which a base autoencoder of this class and config takes an image."""
    family = autoencoder_family(class_name)
    if not family.video:
        return Frames(video=False)
    patch = config.get("patch_size") or 1
    inputs = config["input_channels"] if "input_channels" in config else config["in_channels"]
    return Frames(True, inputs // patch**2, patch, family.first_chunk)


def only_frame(images: Tensor) -> Tensor:
    """(B,c,1,h,w) -> (B,c,h,w).

    Raises:
        ValueError: more than one frame.
    """
    if images.shape[2] != 1:
        raise ValueError(f"found {images.shape[2]} frames; a DetailVAE takes images, which are one frame")
    return images[:, :, 0]


def encode_mode(vae: Any, images: Tensor) -> Tensor:
    """Return latents (B,c,h,w) without noise, as the autoencoder's own `encode` gives them.

    Args:
        vae: a supported autoencoder, whose latents are raw, or a DetailVAE, whose latents are normalised.
        images: (B,3,H,W) in [-1,1].
    """
    frames = _frames(vae)
    encoded = vae.encode(frames.wrap(images))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    return latents[:, :, 0] if frames.video else latents


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Return images (B,3,H,W) in about [-1,1], as the autoencoder's own `decode` gives them.

    Args:
        vae: a supported autoencoder, whose latents are raw, or a DetailVAE, whose latents are normalised.
        latents: (B,c,h,w).
    """
    frames = _frames(vae)
    if not frames.video:
        return vae.decode(latents).sample
    return vae.decode(latents[:, :, None]).sample[:, :3, 0]


def _frames(vae: Any) -> Frames:
    name = type(vae).__name__
    return Frames(video=False) if name == "DetailVAE" else frames_of(name, vae.config)
