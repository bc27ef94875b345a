"""Twice the resolution at the same token count for pretrained diffusion models (DA-VAE).

Names are imported on first use, so that `davae --help` and recipe checks do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from davae.homes import HOMES

__version__ = "0.1.0"

# diffusers looks a pipeline component's loader up on the library that model_index.json names: this one
_HOMES = {**HOMES, "ModelMixin": "diffusers.models.modeling_utils"}

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
    from davae.backbones.expand import expand_transformer
    from davae.backbones.lightning_dit import LightningDiT
    from davae.backbones.lora import widen_lora
    from davae.backbones.pipelines import (
        DetailAuraFlowPipeline,
        DetailErnieImagePipeline,
        DetailHunyuanDiTPipeline,
        DetailKrea2Pipeline,
        DetailLongCatImagePipeline,
        DetailLumina2Pipeline,
        DetailLuminaPipeline,
        DetailPixArtAlphaPipeline,
        DetailPixArtSigmaPipeline,
        DetailQwenImage21Pipeline,
        DetailZImagePipeline,
    )
    from davae.latent import LatentLayout
    from davae.losses.alignment import alignment_loss, group_mean
    from davae.losses.velocity import detail_weight, velocity_loss
    from davae.runs.upgrade_run import UpgradeRun, load, upgrade
    from davae.sample.class_conditional import ClassConditionalPipeline
    from davae.sample.preview import preview
    from davae.sample.upscale import upscale
    from davae.train.loop import Progress
    from davae.vae.detail_vae import DetailVAE
    from davae.vae.pooled_tiny import PooledAutoencoderTiny


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'davae' has no attribute '{name}'")
