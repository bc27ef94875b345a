"""The frozen pretrained transformer to whose base prediction stage 2 is held."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.losses.held_base import held_target
from davae.tasks.conditioning import Conditioning
from davae.tasks.noising import NoisedBatch


class HeldBase:
    """The pretrained base prediction as a share of the base's target.

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
        # frozen, and of no optimizer, engine or checkpoint
        self.transformer = transformer.requires_grad_(False).eval()
        self.layout, self.share, self.precision = layout, share, precision

    @torch.no_grad()
    def target(self, noised: NoisedBatch, conditioning: Conditioning, conditions: list[Any]) -> Tensor:
        """Return the target (B,C+D,h,w) of a noised batch under its conditions."""
        with self.precision():
            held = conditioning.predict(self.transformer, noised.x_t, noised.t, conditions)
        return held_target(noised.target, held, self.layout, self.share)
