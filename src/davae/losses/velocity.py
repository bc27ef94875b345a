"""Loss of stage 2: w(n) of Eq. 12, L_DiT of Eq. 13, and LightningDiT's loss of direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from davae.latent import LatentLayout


def detail_weight(step: int, warmup_steps: int) -> float:
    """Return w(n) of Eq. 12: (1 - cos(pi n / N_warm)) / 2 up to N_warm, then 1."""
    if step >= warmup_steps:
        return 1.0
    return (1.0 - math.cos(math.pi * max(step, 0) / warmup_steps)) / 2.0


@dataclass(frozen=True)
class VelocityLoss:
    """L_DiT of Eq. 13, `total`, and the unweighted mean squared error of each group (Fig. S3)."""

    total: Tensor
    base: Tensor
    detail: Tensor


def velocity_loss(
    prediction: Tensor, target: Tensor, layout: LatentLayout, weight: float, error_weight: Tensor | None = None
) -> VelocityLoss:
    """Return L_DiT of Eq. 13, of velocities, epsilon or v, averaged over batch and positions.

    Args:
        prediction, target: velocities (B,C+D,h,w), or the epsilon or v that the model predicts.
        layout: which channels are base and which detail.
        weight: w(n) in [0,1].
        error_weight: multiplies the squared errors in `total`, as min-SNR weights do: (B,1,1,1), or (B,C+D,1,1) where the
            groups are noised differently.

    Raises:
        ValueError: shapes differ or do not fit the layout.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    if prediction.dtype.itemsize < 4:  # sums of half-precision squares lose the small errors
        prediction, target = prediction.float(), target.float()
    errors = (prediction - target).square()
    base, detail = (group.mean() for group in layout.split(errors))
    weighed = (base, detail)
    if error_weight is not None:
        weighed = tuple(group.mean() for group in layout.split(errors * error_weight.to(errors)))
    n_base, n_detail = layout.base_channels, layout.detail_channels  # |B|, |R| per position
    total = (n_base * weighed[0] + weight * n_detail * weighed[1]) / (n_base + weight * n_detail)
    return VelocityLoss(total, base, detail)


def direction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine of two velocities over the channels, LightningDiT's second term.

    prediction, target (B,c,h,w) -> scalar in [0,2], averaged over batch and positions.
    """
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()


def detail_direction_loss(
    prediction: Tensor, target: Tensor, layout: LatentLayout, weight: float, clean: Tensor | None = None
) -> Tensor:
    """Return `direction_loss` with the detail channels weighed by `weight` in every product.

    With w(n) of Eq. 12 as weight, 0 compares the base alone, 1 all channels alike. Of `clean` samples (B,), whose base has no
    loss, the detail alone is compared: a longer base would lower the angle whatever it predicts.
    prediction, target (B,C+D,h,w) -> scalar in [0,2].
    """
    root = math.sqrt(weight)

    def weighed(velocity: Tensor) -> Tensor:
        base, detail = layout.split(velocity.float())
        if clean is not None:
            base = base.masked_fill(clean.view(-1, 1, 1, 1), 0.0)
        return layout.join(base, root * detail)

    return direction_loss(weighed(prediction), weighed(target))
