"""Pictures through autoencoders of videos: a picture is one frame, maybe in patches, maybe with an opaque alpha channel."""

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
    """How the networks of a base autoencoder take a picture.

    Attributes:
        video: whether they take frames, (B,c,t,h,w), or pictures as they are.
        channels: of a frame; a fourth one is alpha.
        patch: pixels per side that are packed into channels before the encoder and unpacked after the decoder.
        first_chunk: whether the decoder must be told that a frame is the first one.
    """

    video: bool
    channels: int = 3
    patch: int = 1
    first_chunk: bool = False

    def wrap(self, images: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,channels,1,H,W), alpha 1; pictures that are not for a video's autoencoder as they are."""
        if not self.video:
            return images
        missing = self.channels - images.shape[1]
        return F.pad(images, (0, 0, 0, 0, 0, missing), value=1.0)[:, :, None]

    def encode(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """An encoder's (B,c,h,w) for pictures (B,3,H,W)."""
        if not self.video:
            return network(images)
        return network(patchify(self.wrap(images), self.patch))[:, :, 0]

    def decode(self, network: Callable[..., Tensor], latents: Tensor) -> Tensor:
        """A decoder's pictures (B,3,H,W) for latents (B,c,h,w)."""
        if not self.video:
            return network(latents)
        options = {"first_chunk": True} if self.first_chunk else {}
        return unpatchify(network(latents[:, :, None], **options), self.patch)[:, :3, 0]


def frames_of(class_name: str, config: Any) -> Frames:
    """How a base autoencoder of this class and config takes a picture."""
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
        raise ValueError(f"found {images.shape[2]} frames; a DetailVAE takes pictures, which are one frame")
    return images[:, :, 0]


def encode_mode(vae: Any, images: Tensor) -> Tensor:
    """Latents without noise of any supported autoencoder, or of a DetailVAE: (B,3,H,W) in [-1,1] -> (B,C,h,w), raw."""
    frames = _frames(vae)
    encoded = vae.encode(frames.wrap(images))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    return latents[:, :, 0] if frames.video else latents


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures of any supported autoencoder, or of a DetailVAE: raw latents (B,C,h,w) -> (B,3,H,W) in about [-1,1]."""
    frames = _frames(vae)
    if not frames.video:
        return vae.decode(latents).sample
    return vae.decode(latents[:, :, None]).sample[:, :3, 0]


def _frames(vae: Any) -> Frames:
    name = type(vae).__name__
    return Frames(video=False) if name == "DetailVAE" else frames_of(name, vae.config)
