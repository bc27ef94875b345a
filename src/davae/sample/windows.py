"""Overlapping windows of a large latent canvas, and their blended sum (MultiDiffusion, arXiv 2302.08113)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowGrid:
    """Windows of one size that cover a canvas.

    Attributes:
        height, width: of the canvas, in latent positions.
        window: side of a window.
        tops, lefts: first rows and first columns of the windows.
    """

    height: int
    width: int
    window: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, height: int, width: int, window: int, overlap: float, grain: int = 1) -> WindowGrid:
        """Return the fewest windows that cover a canvas with at least a share of `overlap` in common.

        Args:
            height, width: of the canvas, at least `window`; multiples of `grain`.
            overlap: share of a window's side, in [0, 0.75].
            grain: windows begin at multiples of it.
        """
        tops, lefts = (_starts(length, window, overlap, grain) for length in (height, width))
        return cls(height, width, window, tops, lefts)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def gather(self, canvas: Tensor) -> Tensor:
        """Return the windows (N,c,w,w) of a canvas (1,c,H,W), row by row."""
        side = self.window
        return torch.cat([canvas[:, :, y : y + side, x : x + side] for y in self.tops for x in self.lefts])

    def blend(self, parts: Tensor) -> Tensor:
        """Return the canvas (1,c,H,W) whose values are weighted means of the windows (N,c,w,w) over them.

        The weights fall linearly from a window's centre to its edge, so that no window ends in a step.
        """
        if len(parts) == 1:
            return parts
        side = self.window
        slope = torch.arange(side, device=parts.device, dtype=parts.dtype) + 0.5
        ramp = torch.minimum(slope, slope.flip(0)) / side  # (w,)
        weight = ramp[:, None] * ramp
        total = parts.new_zeros(1, parts.shape[1], self.height, self.width)
        weights = parts.new_zeros(self.height, self.width)
        corners = [(y, x) for y in self.tops for x in self.lefts]
        for part, (y, x) in zip(parts, corners, strict=True):
            total[0, :, y : y + side, x : x + side] += part * weight
            weights[y : y + side, x : x + side] += weight
        return total / weights


def _starts(length: int, window: int, overlap: float, grain: int) -> tuple[int, ...]:
    if length <= window:
        return (0,)
    stride = max(grain, int(window * (1 - overlap)) // grain * grain)
    count = -(-(length - window) // stride) + 1
    return tuple(round((length - window) * n / (count - 1) / grain) * grain for n in range(count))
