"""What every training run opens first: accelerator, seeds."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from davae.recipes.schema import Run


def make_accelerator(run: Run) -> Accelerator:
    return Accelerator(mixed_precision=run.mixed_precision)


def seed_initial_weights(seed: int) -> None:
    """New weights depend on the recipe's seed alone, not on what ran before."""
    torch.manual_seed(seed)
