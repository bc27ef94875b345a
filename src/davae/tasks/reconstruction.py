"""Training of an autoencoder by the reconstruction loss and its discriminator (Eq. 5)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from davae.data.images import ImageDataset, collate
from davae.losses.perceptual import perceptual_distance
from davae.losses.reconstruction import (
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    gradient_at,
    reconstruction_loss,
    with_known_gradient,
)
from davae.pretrained.placement import send
from davae.recipes.sections import Reconstruction
from davae.train.distributed import mean_over_ranks
from davae.train.random import SampleRandom
from davae.train.task import Task, Trainable
from davae.vae.discriminator import PatchDiscriminator


class ReconstructionTrainer:
    """L_rec with its GAN, whose discriminator reuses its scores of the reconstruction."""

    def __init__(self, settings: Reconstruction, device: torch.device):
        self.settings = settings
        self.perceptual = (
            perceptual_distance(settings.perceptual, settings.perceptual_weights).to(
                device,
                memory_format=torch.channels_last,  # type: ignore[call-overload]
            )
            if settings.lambda_lpips
            else None
        )
        self.discriminator = (
            PatchDiscriminator(settings.gan_channels, settings.gan_layers).to(
                device,
                memory_format=torch.channels_last,  # type: ignore[call-overload]
            )
            if settings.lambda_adv
            else None
        )
        self._images: Tensor | None = None
        self._fake: Tensor | None = None  # scores of the reconstruction, (B,1,h,w), with their graph

    def trainables(self, autoencoder: Trainable) -> dict[str, Trainable]:
        trainables = {"vae": autoencoder}
        if self.discriminator is not None:
            trainables["discriminator"] = Trainable(
                self.discriminator,
                [{"params": list(self.discriminator.parameters())}],
                lr=self.settings.gan_lr,
                ema=False,
                clip=False,
            )
        return trainables

    def modules(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator} if self.discriminator is not None else {}

    def adversarial(self, step: int) -> bool:
        return self.discriminator is not None and step + 1 >= self.settings.gan_start

    def trainables_at(self, step: int) -> list[str]:
        return ["vae", "discriminator"] if self.adversarial(step) else ["vae"]

    def autoencoder_loss(
        self,
        images: Tensor,
        reconstruction: Tensor,
        mean: Tensor | None,
        logvar: Tensor | None,
        last_layer: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the total of Eq. 5, the pixel terms' gradient at the reconstruction, values to log.

        The perceptual network and the discriminator run backward once, down to the reconstruction; the adaptive weights also
        need the decoder's last layer.

        Args:
            images, reconstruction: (B,3,H,W) in [-1,1].
            mean, logvar: of the posterior, (B,D,h,w); None for a deterministic autoencoder.
            last_layer: weight of the decoder's last layer.
            step: counts from 0.
        """
        s = self.settings
        pixels = reconstruction.detach().requires_grad_()  # (B,3,H,W): the losses' graphs end here
        loss = reconstruction_loss(
            pixels,
            images,
            mean,
            logvar,
            self.perceptual,
            lambda_lpips=s.lambda_lpips,
            lambda_l1=s.lambda_l1,
            lambda_kl=s.lambda_kl,
        )
        logged: dict[str, Any] = {"l1": loss.l1.detach(), "lpips": loss.lpips.detach()}
        if mean is not None:
            logged["kl"] = loss.kl.detach()
        value = loss.pixel.detach()
        pull = gradient = torch.autograd.grad(loss.pixel, pixels)[0]  # (B,3,H,W)
        if self.adversarial(step):
            assert self.discriminator is not None  # not its data-parallel wrapper: that one's pass is over the images
            logits = self.discriminator(pixels)
            adversarial = generator_hinge(logits)
            # the gradient of the mean over all logits would underflow in half precision
            scaled = torch.autograd.grad(adversarial * logits.numel(), pixels, retain_graph=True)[0]
            push = scaled.float() / logits.numel()
            above, below = (mean_over_ranks(gradient_at(reconstruction, last_layer, g)) for g in (pull, push))
            weight = adaptive_weight(above, below)
            value = value + s.lambda_adv * weight * adversarial.detach()
            gradient = pull + s.lambda_adv * weight * push
            logged |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
            self._images, self._fake = images, logits
        total = with_known_gradient(reconstruction, gradient, value) + s.lambda_kl * loss.kl
        return total, pull, logged

    def discriminator_loss(self, discriminator: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        assert self._images is not None, "the autoencoder trains first"
        assert self._fake is not None
        loss = discriminator_hinge(discriminator(self._images), self._fake)
        self._images = self._fake = None
        return loss, {"discriminator": loss.detach()}


def keep_channels_last(autoencoder: nn.Module) -> None:
    """Put residual blocks without dropout in eval mode, which changes their memory layout alone.

    In training mode diffusers' blocks copy their shortcut's input out of channels_last, and their output back.
    """
    for block in autoencoder.modules():
        if isinstance(block, ResnetBlock2D) and not block.dropout.p:
            block.training = False


class ReconstructionTask(Task[Reconstruction]):
    """Training of an autoencoder by Eq. 5, with a discriminator where lambda_adv is not 0."""

    def __init__(
        self,
        settings: Reconstruction,
        images: ImageDataset,
        trainable: Trainable,
        forward: nn.Module,
        device: torch.device,
    ):
        self.settings, self.dataset, self.collate, self.device = settings, images, collate, device
        self.trainer = ReconstructionTrainer(settings, device)
        self.trainables = self.trainer.trainables(trainable)
        keep_channels_last(trainable.module)
        self.modules: dict[str, nn.Module] = {"vae": forward, **self.trainer.modules()}

    def trainables_at(self, step: int) -> list[str]:
        return self.trainer.trainables_at(step)

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        if name == "discriminator":
            return self.trainer.discriminator_loss(self.modules["discriminator"])
        images = send(batch["images"], self.device, torch.channels_last)
        return self.score_reconstruction(images, step, draws)

    @abstractmethod
    def score_reconstruction(self, images: Tensor, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        """Return the scalar loss of the autoencoder on images (B,3,H,W), and values to log."""
