"""Pretraining a small base model from scratch: its autoencoder, then text encoders and transformer together."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from davae.data.pictures import Pictures
from davae.recipes.schema import BaseRecipe, Reconstruction
from davae.train.adversarial import ReconstructionTask
from davae.train.draws import Draws
from davae.train.loop import Player


def build_autoencoder(recipe: BaseRecipe) -> AutoencoderKL:
    """An AutoencoderKL of the recipe's sizes, random weights."""
    a = recipe.autoencoder
    assert not isinstance(a, str)
    levels = len(a.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=a.channels,  # type: ignore[arg-type]
        layers_per_block=a.layers,
        latent_channels=a.latent_channels,
        norm_num_groups=a.norm_groups,
        sample_size=recipe.resolution,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


class AutoencoderPass(nn.Module):
    """One training pass, as a module so that data-parallel wrappers see it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """(B,3,H,W) -> reconstruction (B,3,H,W), posterior mean and logvar (B,C,h,w)."""
        vae: Any = self.vae
        posterior = vae.encode(images).latent_dist
        z = posterior.sample(generator=generators)
        return vae.decode(z).sample, posterior.mean, posterior.logvar


class AutoencoderTask(ReconstructionTask):
    """The base autoencoder: Eq. 5 on plain pictures."""

    name = "vae"

    def __init__(self, settings: Reconstruction, vae: AutoencoderKL, pictures: Pictures, device: torch.device):
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        player = Player(vae, [{"params": list(vae.parameters())}], lr=settings.lr)
        super().__init__(settings, pictures, player, AutoencoderPass(vae), device)

    def autoencoder_turn(self, images: Tensor, step: int, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        reconstruction, mean, logvar = self.modules["vae"](images, draws.samples)
        last = self.vae.decoder.conv_out.weight
        total, _, logged = self.trainer.autoencoder_loss(images, reconstruction, mean, logvar, last, step)
        return total, {"loss": total.detach(), **logged}
