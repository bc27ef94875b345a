"""Frozen transformer of `stage1.dit_alignment` in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from davae.backbones.families import family_of
from davae.cost.flops import meta_transformer
from davae.latent import LatentLayout
from davae.losses.flow_matching import FlowMatching
from davae.pretrained.shapes import BaseShapes
from davae.recipes.sections import Stage1
from davae.tasks.dit_alignment import FrozenFeatures


@dataclass(frozen=True)
class UndrawnLevels(FlowMatching):
    """Flow matching of a rehearsal, for a batch of `count`."""

    count: int = 1

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        return torch.empty(self.count)


def meta_features(
    shapes: BaseShapes, layout: LatentLayout, settings: Stage1, dtype: torch.dtype
) -> FrozenFeatures | None:
    """Return the frozen transformer of `stage1.dit_alignment` without weights, None without it."""
    if settings.dit_alignment is None or not settings.dit_alignment.weight:
        return None
    transformer = nn.Module.to(meta_transformer(shapes), dtype)  # without diffusers' advice
    call = family_of(transformer).require_call()
    null = call.blank(cast(Any, transformer).config)
    objective = UndrawnLevels(count=settings.batch_size)
    return FrozenFeatures(transformer, call, layout, objective, null, settings.dit_alignment.depth)
