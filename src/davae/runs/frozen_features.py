"""Frozen transformer inside which stage 1 aligns the detail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from davae.tasks.dit_alignment import FrozenFeatures
from davae.train.locking import one_at_a_time
from davae.vae.detail_vae import DetailVAE

if TYPE_CHECKING:
    from davae.runs.upgrade_parts import UpgradeParts


def frozen_features(run: UpgradeParts, vae: DetailVAE) -> FrozenFeatures | None:
    """Return the features of a run's base, None without `stage1.dit_alignment`."""
    wanted, base = run.recipe.stage1.dit_alignment, run.base
    if wanted is None or not wanted.weight:
        return None
    call = base.family.require_call().for_pipeline(vae.spatial_factor // vae.layout.scale, base.scheduler)
    with one_at_a_time(run.out):
        transformer = base.load_transformer(run.frozen)
    if base.family.classes_key is None:
        null = tuple(part.detach().to(transformer.dtype) for part in run.embedder()([""]))
    else:
        null = (torch.tensor([int(transformer.config[base.family.classes_key])]),)
    return FrozenFeatures(transformer, call, vae.layout, run.objective, null, wanted.depth)
