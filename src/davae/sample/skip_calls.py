"""Steps of a drawing whose state is known, which need no call of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Later steps that a prediction reaches at most, by the orders of solvers. Not listed are UniPC, whose corrected samples reach
# all later ones, and schedulers that davae does not know.
REACH = {
    None: 0,  # davae's own solvers
    "FlowMatchEulerDiscreteScheduler": 0,
    "EulerDiscreteScheduler": 0,
    "EulerAncestralDiscreteScheduler": 0,
    "DDIMScheduler": 0,
    "DDPMScheduler": 0,
    "HeunDiscreteScheduler": 1,
    "DPMSolverMultistepScheduler": 3,
    "DEISMultistepScheduler": 3,
    "PNDMScheduler": 12,  # 4 without its Runge-Kutta steps
    "LMSDiscreteScheduler": 4,
}


def skipping(model: nn.Module, unused: Callable[[], bool]) -> nn.Module:
    """Return a model that repeats its last output where nothing uses the next one.

    It shares the attributes of `model`, later changes too, and nothing of `model` is replaced: other threads and callbacks
    may use that in the meantime. Compiled models and hooks for offloading work as before.

    Args:
        model: a transformer or U-Net.
        unused: whether the output of the call that begins is not used; the first call for each set of shapes is made all
            the same, because only the model knows what its outputs look like.
    """
    kind: Any = type(model)
    kept: dict[tuple[torch.Size, ...], Any] = {}

    def call(self: Any, *args: Any, **options: Any) -> Any:
        shapes = tuple(one.shape for one in (*args, *options.values()) if isinstance(one, Tensor))
        if not (unused() and shapes in kept):
            kept[shapes] = kind.__call__(self, *args, **options)
        return kept[shapes]

    own = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    shared = object.__new__(type(kind.__name__, (kind,), own))
    object.__setattr__(shared, "__dict__", vars(model))
    return cast(nn.Module, shared)
