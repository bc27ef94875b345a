"""Frozen transformers, for the alignment of stage 1 and the held base of stage 2."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from davae.dataset.encoding import run_precision
from davae.device import compile_blocks
from davae.latent import LatentLayout
from davae.tasks.conditioning import Conditioning
from davae.tasks.dit_alignment import FrozenFeatures
from davae.tasks.held_base import HeldBase
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


def held_base(
    run: UpgradeParts, transformer: nn.Module, conditioning: Conditioning, layout: LatentLayout
) -> HeldBase | None:
    """Return what a run holds its base to, None without `stage2.hold_base`.

    Args:
        transformer: expanded, at its first step.
        conditioning: of its conditions; what it has put into the transformer serves the copy too.
    """
    recipe, device, precision = run.recipe, run.accelerator.device, run_precision(run.recipe.run)
    if not recipe.stage2.hold_base:
        return None
    shared = getattr(conditioning, "processor", None)  # draws a number of tokens at each step
    frozen = copy.deepcopy(transformer, {} if shared is None else {id(shared): shared}).to(device)
    mixed = precision != torch.float32
    if recipe.run.compile == "blocks":
        compile_blocks(frozen, device if mixed else None)
    # accelerate's own context does nothing under DeepSpeed
    context = partial(torch.autocast, device.type, precision) if mixed else nullcontext
    return HeldBase(frozen, layout, recipe.stage2.hold_base, context)
