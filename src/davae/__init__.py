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
    "LightningDiT": "davae.models.lightning_dit",
    "PooledAutoencoderTiny": "davae.models.pooled_tiny",
    "ClassConditionalPipeline": "davae.sample.class_conditional",
    "expand_transformer": "davae.models.expand",
    "widen_lora": "davae.models.lora",
    "group_mean": "davae.losses.alignment",
    "alignment_loss": "davae.losses.alignment",
    "detail_weight": "davae.losses.detail_warmup",
    "velocity_loss": "davae.losses.detail_warmup",
    # diffusers looks a pipeline component's loader up on the library that model_index.json names: this one
    "ModelMixin": "diffusers.models.modeling_utils",
}

__all__ = [
    "ClassConditionalPipeline",
    "DetailVAE",
    "LatentLayout",
    "LightningDiT",
    "PooledAutoencoderTiny",
    "alignment_loss",
    "detail_weight",
    "expand_transformer",
    "group_mean",
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
    from davae.sample.class_conditional import ClassConditionalPipeline


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'davae' has no attribute '{name}'")
