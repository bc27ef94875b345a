"""Pretraining a small base model from scratch: its autoencoder, then text encoders and transformer together."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from davae.data.pictures import Pictures, collate
from davae.recipes.schema import BaseRecipe
from davae.train.adversarial import ReconstructionTrainer
from davae.train.loop import Player


def build_autoencoder(recipe: BaseRecipe) -> AutoencoderKL:
    """An AutoencoderKL of the recipe's sizes, random weights."""
    a = recipe.architecture
    levels = len(a.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=a.vae_channels,  # type: ignore[arg-type]
        layers_per_block=a.vae_layers,
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

    def forward(self, images: Tensor, noise_seed: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(B,3,H,W) -> reconstruction (B,3,H,W), posterior mean and logvar (B,C,h,w)."""
        vae: Any = self.vae
        posterior = vae.encode(images).latent_dist
        z = posterior.sample(generator=noise_seed)
        return vae.decode(z).sample, posterior.mean, posterior.logvar


class AutoencoderTask:
    """The base autoencoder: Eq. 5 on plain pictures."""

    name = "vae"

    def __init__(self, recipe: BaseRecipe, vae: AutoencoderKL, pictures: Pictures, device: torch.device):
        self.settings, self.dataset, self.collate, self.device = recipe.vae, pictures, collate, device
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trainer = ReconstructionTrainer(recipe.vae, device)
        player = Player(vae, [{"params": list(vae.parameters())}], lr=recipe.vae.lr)
        self.players = self.trainer.players(player)
        self.modules: dict[str, nn.Module] = {"vae": AutoencoderPass(vae), **self.trainer.modules()}

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to add."""

    def active(self, step: int) -> list[str]:
        return self.trainer.active(step)

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        if player == "discriminator":
            return self.trainer.discriminator_loss(self.modules["discriminator"])
        images = batch["images"].to(self.device, memory_format=torch.channels_last)
        reconstruction, mean, logvar = self.modules["vae"](images, generator)
        total, _, logged = self.trainer.autoencoder_loss(
            images,
            reconstruction,
            mean,
            logvar,
            self.vae.decoder.conv_out.weight,
            self.modules.get("discriminator"),
            step,
        )
        return total, {"loss": total.detach(), **logged}
