"""Autoencoders that overflow in float16, as SDXL's does, computed again in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from davae.vae.frames import decode_latents, encode_mode

logger = logging.getLogger(__name__)


def computing_device(module: Any) -> torch.device:
    """Return the device on which a module computes, offloaded to main memory or not."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    found = (device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None)
    return torch.device(next(found, module.device))


def in_range(vae: Any, work: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return `work` of values in the autoencoder's precision, in float32 where it overflows.

    The autoencoder is in float16 again afterwards, with the same weights. Other precisions are computed once.

    Args:
        vae: what `work` computes with.
        work: images or latents on its device, in its precision -> (B,...).
        values: on any device, in any precision.
    """
    device = computing_device(vae)
    found = work(values.to(device, vae.dtype))
    if vae.dtype != torch.float16 or bool(torch.isfinite(found).all()) or not bool(torch.isfinite(values).all()):
        return found
    logger.warning("%s: it overflows in float16; computed again in float32", type(vae).__name__)
    del found
    vae.to(torch.float32)
    try:
        return work(values.to(device, torch.float32))
    finally:
        vae.to(torch.float16)


def encode_in_range(vae: Any, images: Tensor) -> Tensor:
    """Return the latents (B,c,h,w) of `encode_mode` for images (B,3,H,W), by `in_range`."""
    return in_range(vae, partial(encode_mode, vae), images)


def decode_in_range(vae: Any, latents: Tensor) -> Tensor:
    """Return the images (B,3,H,W) of `decode_latents` for latents (B,c,h,w), by `in_range`."""
    return in_range(vae, partial(decode_latents, vae), latents)
