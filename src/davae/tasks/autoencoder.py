"""Autoencoder of a small base model, trained from scratch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn

from davae.data.images import ImageDataset
from davae.recipes.base import Autoencoder, BaseRecipe
from davae.recipes.sections import Reconstruction
from davae.tasks.reconstruction import ReconstructionTask
from davae.train.random import SampleRandom
from davae.train.task import Trainable


def build_autoencoder(recipe: BaseRecipe) -> AutoencoderKL | AutoencoderDC:
    """Return an autoencoder of the recipe's family and sizes, with random weights."""
    a = recipe.autoencoder
    assert not isinstance(a, str)
    if a.family == "dc":
        return build_deep_compression(a)
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


def build_deep_compression(a: Autoencoder) -> AutoencoderDC:
    """Return a DC-AE of these sizes: residual blocks, linear attention on the coarsest level."""
    above = len(a.channels) - 1
    same: dict[str, Any] = {
        "block_types": ("ResBlock",) * above + ("EfficientViTBlock",),
        "block_out_channels": a.channels,
        "layers_per_block": (a.layers,) * (above + 1),
        "qkv_multiscales": ((),) * above + ((5,),),
    }
    return AutoencoderDC(
        latent_channels=a.latent_channels,
        attention_head_dim=min(32, a.channels[-1]),
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in same.items()},
    )


class AutoencoderPass(nn.Module):
    """One training pass, as a module so that data-parallel wrappers see it."""

    def __init__(self, vae: AutoencoderKL | AutoencoderDC):
        super().__init__()
        self.vae = vae

    def forward(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return reconstruction (B,3,H,W), posterior mean and logvar (B,C,h,w) or None."""
        vae: Any = self.vae
        encoded = vae.encode(images)
        if isinstance(self.vae, AutoencoderDC):
            return vae.decode(encoded.latent).sample, None, None
        posterior = encoded.latent_dist
        return vae.decode(posterior.sample(generator=generators)).sample, posterior.mean, posterior.logvar


class AutoencoderTask(ReconstructionTask):
    """Base autoencoder: Eq. 5 on plain images."""

    name = "vae"

    def __init__(
        self,
        settings: Reconstruction,
        vae: AutoencoderKL | AutoencoderDC,
        images: ImageDataset,
        device: torch.device,
    ):
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainable = Trainable(vae, [{"params": list(vae.parameters())}], lr=settings.lr)
        super().__init__(settings, images, trainable, AutoencoderPass(vae), device)

    def score_reconstruction(self, images: Tensor, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        reconstruction, mean, logvar = self.modules["vae"](images, draws.samples)
        last = self.vae.decoder.conv_out.weight
        total, _, logged = self.trainer.autoencoder_loss(images, reconstruction, mean, logvar, last, step)
        return total, {"loss": total.detach(), **logged}
