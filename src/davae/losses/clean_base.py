"""Training for enlarging: some samples keep a clean base and train the detail alone."""

from __future__ import annotations

import torch
from torch import Tensor

from davae.latent import LatentLayout


def with_clean_base(x_t: Tensor, latents: Tensor, layout: LatentLayout, chosen: Tensor) -> Tensor:
    """Return x_t = [z, a z_d + s n_d] for the chosen samples: only their detail is noised.

    Args:
        x_t, latents: noised and clean z_hr (B,C+D,h,w).
        layout: which channels are base.
        chosen: (B,) booleans.
    """
    z, _ = layout.split(latents)
    noised, z_d = layout.split(x_t)
    return layout.join(torch.where(chosen.view(-1, 1, 1, 1), z.to(noised), noised), z_d)


def mean_base_error(mean: Tensor, clean: Tensor | None) -> Tensor:
    """Return the mean base error of the samples that have one.

    Args:
        mean: that of all samples, in which the clean ones (B,) count as zero.
    """
    return mean if clean is None else mean * len(clean) / (~clean).sum().clamp(min=1)


def without_base_error(target: Tensor, prediction: Tensor, layout: LatentLayout, chosen: Tensor) -> Tensor:
    """Return the target with the base of the chosen samples replaced by their prediction.

    A clean base holds none of its noise, so its velocity n - z cannot be predicted from it; its error becomes zero.

    Args:
        target, prediction: (B,C+D,h,w).
        layout: which channels are base.
        chosen: (B,) booleans.
    """
    base, detail = layout.split(target)
    predicted, _ = layout.split(prediction.detach())
    return layout.join(torch.where(chosen.view(-1, 1, 1, 1), predicted.to(base), base), detail)
