"""Twice the resolution at the same token count for pretrained latent diffusion models (DA-VAE).

Names are imported on first use, so that `davae --help` and recipe checks do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LatentLayout": "davae.latent",
    "DetailVAE": "davae.models.detail_vae",
    "DetailErnieImagePipeline": "davae.sample.upgraded_pipelines",
    "DetailKrea2Pipeline": "davae.sample.upgraded_pipelines",
    "DetailLongCatImagePipeline": "davae.sample.upgraded_pipelines",
    "DetailQwenImage21Pipeline": "davae.sample.upgraded_pipelines",
    "DetailZImagePipeline": "davae.sample.upgraded_pipelines",
    "LightningDiT": "davae.models.lightning_dit",
    "PooledAutoencoderTiny": "davae.models.pooled_tiny",
    "ClassConditionalPipeline": "davae.sample.class_conditional",
    "DetailAuraFlowPipeline": "davae.sample.base_pixels",
    "DetailLuminaPipeline": "davae.sample.base_pixels",
    "DetailLumina2Pipeline": "davae.sample.base_pixels",
    "DetailHunyuanDiTPipeline": "davae.sample.ddpm_pipelines",
    "DetailPixArtAlphaPipeline": "davae.sample.ddpm_pipelines",
    "DetailPixArtSigmaPipeline": "davae.sample.ddpm_pipelines",
    "expand_transformer": "davae.models.expand",
    "widen_lora": "davae.models.lora",
    "upgrade": "davae.upgrade_run",
    "load": "davae.upgrade_run",
    "UpgradeRun": "davae.upgrade_run",
    "Progress": "davae.train.loop",
    "group_mean": "davae.losses.alignment",
    "alignment_loss": "davae.losses.alignment",
    "detail_weight": "davae.losses.detail_warmup",
    "velocity_loss": "davae.losses.detail_warmup",
    "preview": "davae.sample.preview",
    "upscale": "davae.sample.upscale",
    # diffusers looks a pipeline component's loader up on the library that model_index.json names: this one
    "ModelMixin": "diffusers.models.modeling_utils",
}

__all__ = [
    "ClassConditionalPipeline",
    "DetailAuraFlowPipeline",
    "DetailErnieImagePipeline",
    "DetailHunyuanDiTPipeline",
    "DetailKrea2Pipeline",
    "DetailLongCatImagePipeline",
    "DetailLumina2Pipeline",
    "DetailLuminaPipeline",
    "DetailPixArtAlphaPipeline",
    "DetailPixArtSigmaPipeline",
    "DetailQwenImage21Pipeline",
    "DetailVAE",
    "DetailZImagePipeline",
    "LatentLayout",
    "LightningDiT",
    "PooledAutoencoderTiny",
    "Progress",
    "UpgradeRun",
    "alignment_loss",
    "detail_weight",
    "expand_transformer",
    "group_mean",
    "load",
    "preview",
    "upgrade",
    "upscale",
    "velocity_loss",
    "widen_lora",
]

if TYPE_CHECKING:
    from davae.latent import LatentLayout
    from davae.losses.alignment import alignment_loss, group_mean
    from davae.losses.detail_warmup import detail_weight, velocity_loss
    from davae.models.detail_vae import DetailVAE
    from davae.models.expand import expand_transformer
    from davae.models.lightning_dit import LightningDiT
    from davae.models.lora import widen_lora
    from davae.models.pooled_tiny import PooledAutoencoderTiny
    from davae.sample.base_pixels import DetailAuraFlowPipeline, DetailLumina2Pipeline, DetailLuminaPipeline
    from davae.sample.class_conditional import ClassConditionalPipeline
    from davae.sample.ddpm_pipelines import (
        DetailHunyuanDiTPipeline,
        DetailPixArtAlphaPipeline,
        DetailPixArtSigmaPipeline,
    )
    from davae.sample.preview import preview
    from davae.sample.upgraded_pipelines import (
        DetailErnieImagePipeline,
        DetailKrea2Pipeline,
        DetailLongCatImagePipeline,
        DetailQwenImage21Pipeline,
        DetailZImagePipeline,
    )
    from davae.sample.upscale import upscale
    from davae.train.loop import Progress
    from davae.upgrade_run import UpgradeRun, load, upgrade


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'davae' has no attribute '{name}'")
