"""What every training run opens first: accelerator, pictures, seeds."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from davae.data.pictures import PictureSource, split
from davae.data.sources import open_source, usable
from davae.recipes.schema import Data, Run


def make_accelerator(run: Run) -> Accelerator:
    return Accelerator(mixed_precision=run.mixed_precision)


def open_pictures(data: Data, resolution: int) -> tuple[PictureSource, list[int], list[int]]:
    """(source, training indices, held-out indices); pictures below `resolution` are left out by name."""
    source = open_source(
        data.source,
        resolution,
        background=data.background,
        image_column=data.image_column,
        caption_column=data.caption_column,
    )
    parts = split(source, data.holdout)
    keep = set(usable(source, sorted(parts.train + parts.held_out), resolution))
    train = [i for i in parts.train if i in keep]
    held_out = [i for i in parts.held_out if i in keep]
    if not train:  # the only usable pictures are held out: rather train on them than fail
        train = held_out
    return source, train, held_out


def seed_initial_weights(seed: int) -> None:
    """New weights depend on the recipe's seed alone, not on what ran before."""
    torch.manual_seed(seed)
