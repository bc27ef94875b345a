"""A base held to the frozen pretrained transformer's prediction in stage 2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.tasks.conditioning import Conditioning
from davae.tasks.noising import NoisedBatch


def held_target(target: Tensor, pretrained: Tensor, layout: LatentLayout, share: float) -> Tensor:
    """Return the target with (1 - h) v + h v_0 in the place of the base's v.

    v_0 is the pretrained model's prediction. The squared errors of both, weighed by 1 - h and h, have the gradient of the
    error of their mean: d/dp [(1 - h) (p - v)^2 + h (p - v_0)^2] = 2 (p - (1 - h) v - h v_0). So one loss trains the base on
    the images and holds it to what it knew (self-distillation, as in Learning without Forgetting, Li and Hoiem, 2016).

    Args:
        target: of the images, (B,C+D,h,w).
        pretrained: (B,C+D,h,w), of which the base is read.
        layout: which channels are base.
        share: h in [0,1].
    """
    base, detail = layout.split(target)
    return layout.join(torch.lerp(base, layout.split(pretrained)[0].to(base), share), detail)


class HeldBase(nn.Module):
    """The target of stage 2 whose base is held to the pretrained prediction.

    Args:
        transformer: expanded with zero weights: it predicts the base as the pretrained model does (Eq. 9). Frozen here.
        layout: which channels are base.
        share: h of `held_target`.
        precision: returns the context of the training's mixed precision.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layout: LatentLayout,
        share: float,
        precision: Callable[[], AbstractContextManager[Any]],
    ):
        super().__init__()
        self.transformer = transformer.requires_grad_(False).eval()  # of no optimizer, engine or checkpoint
        self.layout, self.share, self.precision = layout, share, precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the frozen transformer's output, in mixed precision as the trained one's."""
        with self.precision():
            return self.transformer(*args, **kwargs)

    @torch.no_grad()
    def target(self, noised: NoisedBatch, conditioning: Conditioning, conditions: list[Any]) -> Tensor:
        """Return the target (B,C+D,h,w) of a noised batch under its conditions."""
        held = conditioning.predict(self, noised.x_t, noised.t, conditions)
        return held_target(noised.target, held, self.layout, self.share)
