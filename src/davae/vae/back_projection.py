"""Enlarged images that agree with the small image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from davae.vae.blocks import downsample

PASSES = 3


def back_projected(images: Tensor, source: Tensor, scale: int, passes: int = PASSES) -> Tensor:
    """Bring images back to the source that they were enlarged from.

    x <- clamp(x + up(source - down(x))), as iterative back-projection (Irani and Peleg, 1991); `down` is bicubic with
    antialiasing, `up` bicubic: only what the source shows is changed.

    Args:
        images: (B,3,sH,sW) in [-1,1].
        source: (B,3,H,W).
        scale: s.
        passes: corrections.
    """
    images = images.clamp(-1, 1)
    for _ in range(passes):
        missing = source - downsample(images, scale)
        raised = F.interpolate(missing, images.shape[-2:], mode="bicubic", align_corners=False)
        images = (images + raised).clamp(-1, 1)
    return images


def enlarged_by_bicubic(source: Tensor, scale: int) -> Tensor:
    """Return the bicubic enlargement of (B,3,H,W) after back-projection, (B,3,sH,sW) in [-1,1]."""
    images = F.interpolate(source, scale_factor=scale, mode="bicubic", align_corners=False)
    return back_projected(images, source, scale)
