"""Optimizer of a recipe, and its learning rate over time."""

from __future__ import annotations

import math
from typing import Any

import torch

from davae.recipes.sections import Optim


def build_optimizer(settings: Optim, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Return the recipe's AdamW.

    Args:
        settings: of the training.
        groups: of parameters; each may carry a `lr_multiplier`.
        lr: learning rate after warm-up.
    """
    groups = [{"lr_multiplier": 1.0, **group} for group in groups]
    options: dict[str, Any] = {"lr": lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=settings.optimizer == "adamw-fused" or None, **options)


def learning_rate(settings: Optim, lr: float, step: int) -> float:
    """Return the rate at a step from 0 on: linear warm-up, then the recipe's schedule."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    place = settings.lr_cycles * min(1.0, progress) % 1.0
    return lr * (1 - place) if settings.lr_schedule == "linear" else lr * 0.5 * (1 + math.cos(math.pi * place))
