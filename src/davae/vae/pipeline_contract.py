"""Entries that stock pipelines read of an autoencoder, for a DetailVAE's normalised latents."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

from torch import Tensor, nn

from davae.vae.base import AutoencoderFamily

# of the identity batch norm that pipelines with packed statistics find: some write this value, others read it here
EPSILON = 1e-5


def keeps_warning(record: logging.LogRecord) -> bool:
    """Return False for diffusers' warning that a pipeline's `vae` is a DetailVAE.

    The pipeline uses an autoencoder's methods and config alone, which a DetailVAE has. Warnings on other parts and classes
    stay.
    """
    message = record.getMessage()
    return not (message.startswith("Expected types for vae:") and "DetailVAE'>" in message)


def pipeline_entries(
    vae: nn.Module, family: AutoencoderFamily, base_config: Any, channels: int, spatial_factor: int
) -> dict[str, Any]:
    """Return config entries, and set the attributes, that pipelines of the base's kind look up.

    Pipelines for video autoencoders read attributes and a mean and std per channel. Those that pack 2x2 positions read a
    batch norm `bn` over them in (c,2,2) order, here the identity. Those of SDXL run a float16 autoencoder in float32 where
    `force_upcast` is true: an upgraded decoder overflows where its base does.

    Args:
        vae: the DetailVAE, whose attributes are set.
        base_config: config of the base autoencoder.
        channels: C + D.
        spatial_factor: pixels per latent position, each way.
    """
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(keeps_warning)
    entries: dict[str, Any] = {"force_upcast": bool(base_config.get("force_upcast", False))}
    if family.cell > 1:
        norm = nn.BatchNorm2d(family.cell**2 * channels, eps=EPSILON, affine=False)
        cast(Tensor, norm.running_var).fill_(1 - EPSILON)
        vae.bn = norm
        entries["batch_norm_eps"] = EPSILON
    if family.video:
        cast(Any, vae).temperal_downsample = [False] * int(math.log2(spatial_factor))  # their number gives the factor
        entries["temperal_downsample"] = vae.temperal_downsample
        entries |= {"z_dim": channels, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return entries
