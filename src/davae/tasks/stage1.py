"""Stage 1: the detail-aligned VAE (Sec. 3.1, Eq. 3-6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.data.images import ImageDataset
from davae.losses.alignment import alignment_loss
from davae.losses.reconstruction import adaptive_weight, gradient_at, with_known_gradient
from davae.pretrained.placement import send
from davae.recipes.sections import Stage1
from davae.tasks.dit_alignment import FrozenFeatures
from davae.tasks.reconstruction import ReconstructionTask
from davae.train.distributed import mean_over_ranks
from davae.train.random import SampleRandom
from davae.train.task import Trainable
from davae.vae.detail_vae import DetailVAE


def random_squares(images: Tensor, side: int, draws: SampleRandom) -> Tensor:
    """Cut a square of `side` pixels at a drawn place of each image, (B,3,side,side).

    Images that are not larger stay whole. All layers but attention are local, so that many small squares train a DetailVAE at
    a fraction of a whole image's cost.
    """
    height, width = images.shape[-2:]
    if side >= min(height, width):
        return images
    places = (((length - side + 1) * draws.uniform()).long().tolist() for length in (height, width))
    cut = [one[:, y : y + side, x : x + side] for one, y, x in zip(images, *places, strict=True)]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)


class DetailVAEPass(nn.Module):
    """One encoder and one decoder pass, as a module so that data-parallel wrappers see it."""

    def __init__(self, vae: DetailVAE, detail_dropout: float):
        super().__init__()
        self.vae, self.detail_dropout = vae, detail_dropout

    def forward(self, images: Tensor, noise: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return reconstruction (B,3,sH,sW), raw z (B,C,h,w), mean and logvar of raw z_d (B,D,h,w).

        Args:
            images: I_hr (B,3,sH,sW).
            noise: standard normal (B,D,h,w).
            chance: uniform (B,); a sample keeps its detail from `detail_dropout` on.
        """
        raw = self.vae.encode_raw(images)
        z_d = raw.mean + (0.5 * raw.logvar).exp() * noise.to(raw.mean)  # (B,D,h,w)
        if self.detail_dropout:
            kept = chance.to(z_d) >= self.detail_dropout
            z_d = z_d * (kept / (1 - self.detail_dropout)).view(-1, 1, 1, 1)
        return self.vae.decode_raw(self.vae.layout.join(raw.z, z_d)), raw.z, raw.mean, raw.logvar


class Stage1Task(ReconstructionTask):
    """Training of detail encoder and decoder with a frozen base encoder (Eq. 6)."""

    name = "stage1"

    def __init__(
        self,
        settings: Stage1,
        vae: DetailVAE,
        images: ImageDataset,
        device: torch.device,
        features: FrozenFeatures | None = None,
    ):
        self.stage, self.vae = settings, vae.to(device, memory_format=vae.memory_format)  # type: ignore[call-overload]
        self.vae.train()
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        parameters = [*vae.detail_encoder.parameters(), *vae.decoder.parameters()]
        trainable = Trainable(vae, [{"params": parameters}], lr=settings.lr)
        super().__init__(settings, images, trainable, DetailVAEPass(vae, settings.detail_dropout), device)
        self.features = features
        self._inside: Tensor | None = None  # L_align inside the transformer, with its graph, for the adapter
        if features is not None:
            assert settings.dit_alignment is not None
            features.to(device)
            adapter = features.adapter(settings.dit_alignment.rank).to(device)
            groups = [{"params": list(adapter.parameters())}]
            self.trainables["dit_alignment"] = Trainable(adapter, groups, lr=settings.dit_alignment.lr, ema=False)
            self.modules["dit_alignment"] = adapter

    def trainables_at(self, step: int) -> list[str]:
        return [*super().trainables_at(step), *([] if self.features is None else ["dit_alignment"])]

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        if name != "dit_alignment":
            return super().loss(name, batch, step, draws)
        loss, self._inside = self._inside, None
        assert loss is not None, "the autoencoder trains first"
        return loss, {}

    def score_reconstruction(self, images: Tensor, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        s, factor = self.stage, self.vae.spatial_factor
        if s.crop is not None:
            images = random_squares(images, s.crop, draws)  # (B,3,crop,crop)
        height, width = images.shape[-2] // factor, images.shape[-1] // factor
        noise = draws.normal(self.vae.layout.detail_channels, height, width)
        chance = send(draws.uniform(), images.device)
        reconstruction, z, mean, logvar = self.modules["vae"](images, send(noise, images.device), chance)
        # looked up before any gradient is taken: FSDP2 puts the pieces back after that
        last, last_encoder = self.vae.last_decoder_weight, self.vae.last_encoder_weight
        total, pull, logged = self.trainer.autoencoder_loss(images, reconstruction, mean, logvar, last, step)
        align = alignment_loss(mean.float(), z.float())
        weight: Tensor | float = s.lambda_align
        if s.alignment == "adaptive" and s.lambda_align:
            above = gradient_at(reconstruction, last_encoder, pull)
            below = gradient_at(align, last_encoder, torch.ones_like(align), mean.numel())
            weight = s.lambda_align * adaptive_weight(mean_over_ranks(above), mean_over_ranks(below))
        total = total + weight * align  # Eq. 6
        if self.features is not None:
            above = gradient_at(reconstruction, last_encoder, pull)
            term, inside = self.score_features(images, z, mean, last_encoder, above, draws)
            total, logged = total + term, logged | inside
        return total, {"loss": total.detach(), **logged, "align": align.detach()}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions (B,3,sH,sW) without noise."""
        height, width = images.shape[-2] // self.vae.spatial_factor, images.shape[-1] // self.vae.spatial_factor
        noise = images.new_zeros(len(images), self.vae.layout.detail_channels, height, width)
        return self.modules["vae"](images, noise, torch.ones(len(images)))[0]

    def score_features(
        self, images: Tensor, z: Tensor, mean: Tensor, last_encoder: Tensor, above: Tensor, draws: SampleRandom
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the weighed L_align of the frozen transformer (GRACE, Eq. 10), and values to log.

        The graph behind z_d is differentiated apart: the encoder gets the weighed gradient, the adapter its own in `loss`.

        Args:
            images: I_hr (B,3,sH,sW).
            z, mean: raw z (B,C,h,w) and the mean of z_d (B,D,h,w).
            last_encoder: weight of the encoder's last layer.
            above: gradient of the reconstruction at it.
            draws: of the batch.
        """
        settings = self.stage.dit_alignment
        assert settings is not None
        assert self.features is not None
        with torch.no_grad():
            full = self.vae.encode_base(images).float()  # z_pre, Eq. 7
        detail = mean.detach().float().requires_grad_()  # the features' graph ends here
        latents = self.vae.normalise(self.vae.layout.join(z.detach().float(), detail))
        inside = self.features.loss(self.modules["dit_alignment"], full, latents, draws)
        self._inside = inside
        gradient = torch.autograd.grad(inside, detail, retain_graph=True)[0]
        weight: Tensor | float = settings.weight
        if settings.weighting == "adaptive":
            below = gradient_at(mean, last_encoder, gradient)
            weight = settings.weight * adaptive_weight(mean_over_ranks(above), mean_over_ranks(below))
        term = with_known_gradient(mean, weight * gradient, weight * inside)
        return term, {"dit_align": inside.detach(), "dit_align_weight": torch.as_tensor(weight)}
