"""Polish of stage 1: the decoder alone, on noised latents (arXiv 2510.11690)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.data.images import ImageDataset
from davae.losses.decoder_noise import noise_latents, replace_detail
from davae.pretrained.placement import send
from davae.recipes.stages import POLISH, Stage1
from davae.tasks.reconstruction import ReconstructionTask
from davae.tasks.stage1 import random_squares
from davae.train.random import SampleRandom
from davae.train.task import Trainable
from davae.vae.detail_vae import DetailVAE


class NoisedDecoding(nn.Module):
    """One pass through frozen encoders and the decoder.

    It is a module so that data-parallel wrappers see it.
    """

    def __init__(self, vae: DetailVAE, tau: float, detail: float):
        super().__init__()
        self.vae, self.tau, self.detail = vae, tau, detail

    def forward(self, images: Tensor, noise: Tensor, strength: Tensor, replacing: Tensor, share: Tensor) -> Tensor:
        """Return the reconstruction (B,3,sH,sW) from noised latents.

        The latents are those that stage 2 learns: z, and the mean of z_d. They are noised as the transformer takes them,
        normalised: tau is then in units of a channel's standard deviation, as a generator's errors are.

        Args:
            images: I_hr (B,3,sH,sW).
            noise: standard normal (B,C+D,h,w).
            strength: uniform (B,).
            replacing: standard normal, in place of z_d, (B,D,h,w).
            share: uniform (B,).
        """
        with torch.no_grad():
            raw = self.vae.encode_raw(images)
            latents = self.vae.normalise(self.vae.layout.join(raw.z, raw.mean))
            z, z_d = self.vae.layout.split(latents)
            latents = self.vae.layout.join(z, replace_detail(z_d, replacing, share, self.detail))
            noised = self.vae.denormalise(noise_latents(latents, noise, strength, self.tau))
        return self.vae.decode_raw(noised)


class PolishTask(ReconstructionTask):
    """Training of the decoder alone by Eq. 5 without KL, so that all latents stay as they are."""

    name = POLISH

    def __init__(self, settings: Stage1, vae: DetailVAE, images: ImageDataset, device: torch.device):
        """Freeze everything but the decoder.

        Args:
            settings: `Stage1.polishing`.
            vae: trained by stage 1, with the statistics of the cache.
            images: training set of stage 1.
            device: of the training.
        """
        assert settings.polish is not None
        self.stage, self.vae = settings, vae.to(device, memory_format=vae.memory_format)  # type: ignore[call-overload]
        self.vae.requires_grad_(False).train()
        self.vae.detail_encoder.eval()  # as the cache was encoded
        self.vae.decoder.requires_grad_(True)
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        trainable = Trainable(vae, [{"params": list(vae.decoder.parameters())}], lr=settings.lr)
        decoding = NoisedDecoding(vae, settings.polish.noise, settings.polish.detail_noise)
        super().__init__(settings, images, trainable, decoding, device)

    def score_reconstruction(self, images: Tensor, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        if self.stage.crop is not None:
            images = random_squares(images, self.stage.crop, draws)  # (B,3,crop,crop)
        height, width = (side // self.vae.spatial_factor for side in images.shape[-2:])
        layout = self.vae.layout
        drawn = draws.normal(layout.channels, height, width), draws.uniform()
        drawn = *drawn, draws.normal(layout.detail_channels, height, width), draws.uniform()
        reconstruction = self.modules["vae"](images, *(send(values, images.device) for values in drawn))
        last = self.vae.last_decoder_weight  # before any gradient is taken: FSDP2 puts the pieces back after that
        total, _, logged = self.trainer.autoencoder_loss(images, reconstruction, None, None, last, step)
        return total, {"loss": total.detach(), **logged}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions (B,3,sH,sW) without noise."""
        height, width = (side // self.vae.spatial_factor for side in images.shape[-2:])
        noise = images.new_zeros(len(images), self.vae.layout.channels, height, width)
        strength = images.new_zeros(len(images))
        return self.modules["vae"](images, noise, strength, self.vae.layout.split(noise)[1], strength)
