"""A base that is held to the pretrained model's prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from davae.latent import LatentLayout


def held_target(target: Tensor, pretrained: Tensor, layout: LatentLayout, share: float) -> Tensor:
    """Return the target with (1 - h) v + h v_0 in the place of the base's v.

    v_0 is the pretrained model's prediction. The squared errors of both targets, weighed by 1 - h and h, have the gradient of
    the error of their mean: d/dp [(1 - h) (p - v)^2 + h (p - v_0)^2] = 2 (p - (1 - h) v - h v_0). So one loss trains the base
    on the data and holds it to what it knew (self-distillation, as in Learning without Forgetting, Li and Hoiem, 2016).

    Args:
        target: of the data, (B,C+D,h,w).
        pretrained: (B,C+D,h,w), of which the base is read.
        layout: which channels are base.
        share: h in [0,1].
    """
    base, detail = layout.split(target)
    return layout.join(torch.lerp(base, layout.split(pretrained)[0].to(base), share), detail)
