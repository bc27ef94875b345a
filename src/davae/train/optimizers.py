"""Which optimizer a recipe asks for, and its learning rate over time."""

from __future__ import annotations

import math
from typing import Any

import torch

from davae.errors import RunError
from davae.recipes.sections import Optim


def build_optimizer(settings: Optim, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW as the recipe wants it. `groups` may carry a `lr_multiplier` each.

    Raises:
        RunError: 8-bit is asked for without bitsandbytes.
    """
    groups = [{"lr_multiplier": 1.0, **group} for group in groups]
    options: dict[str, Any] = {"lr": lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
        except ImportError as error:
            raise RunError(
                "optimizer: adamw-8bit needs bitsandbytes; `pip install bitsandbytes`, or set it to adamw"
            ) from error
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=settings.optimizer == "adamw-fused" or None, **options)


def learning_rate(settings: Optim, lr: float, step: int) -> float:
    """Linear warm-up, then constant, or linear or cosine to zero, `lr_cycles` times over; `step` counts from 0."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    place = settings.lr_cycles * min(1.0, progress) % 1.0
    return lr * (1 - place) if settings.lr_schedule == "linear" else lr * 0.5 * (1 + math.cos(math.pi * place))
