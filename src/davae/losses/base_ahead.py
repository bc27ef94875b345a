"""Base ahead of the detail at two noise levels (GRACE, arXiv 2610.10524, Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from davae.losses.flow_matching import shift_timestep


def base_ahead_times(progress: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the schedule times of base and detail, Eq. 11 of GRACE.

    One clock u runs over [0, 1 + delta], 1 + delta is noise. The base takes the part [delta, 1 + delta] of it, the detail the
    part [0, 1], and each rests outside its part:

        u_base = max(u - delta, 0),  u_detail = min(u, 1).

    A sampler that runs u from 1 + delta to 0 moves the base alone while u > 1, both at a distance of delta in between, and
    the detail alone while u < delta. The base is never the noisier one, and delta = 0 is one time for both.

    Args:
        progress: u in [0, 1 + delta], of any shape.
        offset: delta, not negative; of a shape that broadcasts.

    Returns:
        u_base and u_detail in [0,1], with 1 noise.
    """
    return (progress - offset).clamp(0, 1), progress.clamp(0, 1)  # the other bounds hold but for rounding


def base_ahead_levels(progress: Tensor, offset: Tensor | float, shift: float) -> Tensor:
    """Return the noise levels of base and detail at u, Eq. 1 and 11 of GRACE.

    Eq. 1, by which each schedule time is shifted, is `shift_timestep`. Both groups have the same shift, so that a detail
    without an offset has the base's level.

    Args:
        progress: u in [0, 1 + delta], (n,).
        offset: delta, a number or (n,).
        shift: s; above 1 towards noise.

    Returns:
        (n,2): sigma of the base, then of the detail, with 1 noise.
    """
    return shift_timestep(torch.stack(base_ahead_times(progress, offset), dim=-1), shift)
