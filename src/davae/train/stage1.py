"""Stage 1: the detail-aligned VAE (Sec. 3.1, Eq. 3-6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.data.pictures import Pictures
from davae.losses.alignment import alignment_loss
from davae.losses.reconstruction import adaptive_weight
from davae.models.detail_vae import DetailVAE
from davae.models.posterior import RawLatents
from davae.recipes.schema import Stage1
from davae.train.adversarial import ReconstructionTask
from davae.train.loop import Player


class DetailVAEPass(nn.Module):
    """One encoder and one decoder pass, as a module so that data-parallel wrappers see it."""

    def __init__(self, vae: DetailVAE, detail_dropout: float):
        super().__init__()
        self.vae, self.detail_dropout = vae, detail_dropout

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, RawLatents]:
        """I_hr (B,3,sH,sW) -> its reconstruction, and the raw latents."""
        raw = self.vae.encode_raw(images)
        noise = torch.randn(raw.mean.shape, generator=generator).to(raw.mean)
        z_d = raw.mean + (0.5 * raw.logvar).exp() * noise  # (B,D,h,w)
        if self.detail_dropout:
            kept = torch.rand(len(z_d), generator=generator).to(z_d) >= self.detail_dropout
            z_d = z_d * (kept / (1 - self.detail_dropout)).view(-1, 1, 1, 1)
        return self.vae.decode_raw(self.vae.layout.join(raw.z, z_d)), raw


class Stage1Task(ReconstructionTask):
    """Trains detail encoder and decoder; the base encoder never changes."""

    name = "stage1"

    def __init__(self, settings: Stage1, vae: DetailVAE, pictures: Pictures, device: torch.device):
        self.stage, self.vae = settings, vae.to(device, memory_format=vae.memory_format)  # type: ignore[call-overload]
        self.vae.train()
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        parameters = [*vae.detail_encoder.parameters(), *vae.decoder.parameters()]
        player = Player(vae, [{"params": parameters}], lr=settings.lr)
        super().__init__(settings, pictures, player, DetailVAEPass(vae, settings.detail_dropout), device)

    def autoencoder_turn(
        self, images: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        s = self.stage
        reconstruction, raw = self.modules["vae"](images, generator)
        last = self.vae.last_decoder_weight
        total, pull, logged = self.trainer.autoencoder_loss(
            images, reconstruction, raw.mean, raw.logvar, last, self.modules.get("discriminator"), step
        )
        align = alignment_loss(raw.mean.float(), raw.z.float())
        weight: Tensor | float = s.lambda_align
        if s.alignment == "adaptive" and s.lambda_align:
            last = self.vae.last_encoder_weight
            above = torch.autograd.grad(reconstruction, last, pull.to(reconstruction.dtype), retain_graph=True)[0]
            weight = s.lambda_align * adaptive_weight(above, torch.autograd.grad(align, last, retain_graph=True)[0])
        total = total + weight * align  # Eq. 6
        return total, {"loss": total.detach(), **logged, "align": align.detach()}
