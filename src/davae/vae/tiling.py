"""Run a network over overlapping tiles and blend the seams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Side of a tile in pixels, and the fraction that neighbouring tiles share, in [0, 0.5]."""

    tile: int
    overlap: float

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0.0 <= self.overlap <= 0.5:
            raise ValueError(
                f"a tile must be positive and overlap at most half, found {self.tile} and {self.overlap}"
            )


def tiled(network: Callable[[Tensor], Tensor], inputs: Tensor, tile: int, overlap: float, factor: float) -> Tensor:
    """Apply `network` tile by tile, neighbouring outputs cross-faded linearly.

    Args:
        inputs: (B,...,H,W).
        tile: side of a tile on the input grid; overlap: fraction of it shared with the neighbour.
        factor: output positions per input position (8 for a decoder, 1/8 for an encoder).
    """
    height, width = inputs.shape[-2:]
    grain = max(1, round(1 / factor))  # tiles start where the output grid has a position
    shared = round(tile * overlap)
    tile_height, rows = spans(height, tile, shared, grain)
    tile_width, columns = spans(width, tile, shared, grain)
    result: Tensor | None = None
    total: Tensor | None = None
    for top in rows:
        for left in columns:
            piece = inputs[..., top : top + tile_height, left : left + tile_width]
            output = network(piece)  # (B,c',tile*factor,tile*factor)
            if result is None or total is None:
                result = output.new_zeros(*output.shape[:-2], round(height * factor), round(width * factor))
                total = output.new_zeros(result.shape[-2:])
            fade = round(shared * factor)
            ramp_y = _ramp(output.shape[-2], fade, top > 0, top + tile_height < height, output)
            ramp_x = _ramp(output.shape[-1], fade, left > 0, left + tile_width < width, output)
            weight = ramp_y[:, None] * ramp_x[None, :]
            y, x = round(top * factor), round(left * factor)
            window = (..., slice(y, y + output.shape[-2]), slice(x, x + output.shape[-1]))
            result[window] += output * weight
            total[window[1:]] += weight
    assert result is not None
    assert total is not None
    return result.div_(total)


def spans(length: int, tile: int, shared: int, grain: int) -> tuple[int, list[int]]:
    """Return the side and first positions of the fewest tiles that cover a length.

    They are as small as that many allow, so that little is computed twice; sides and positions are multiples of `grain`.
    """
    if length <= tile:
        return length, [0]
    tile = max(grain, tile // grain * grain)
    shared = min(shared, tile - grain)
    count = -(-(length - shared) // (tile - shared))
    side = min(tile, -(-(length + (count - 1) * shared) // (count * grain)) * grain)
    return side, [round((length - side) * n / (count - 1) / grain) * grain for n in range(count)]


def _ramp(length: int, shared: int, fade_in: bool, fade_out: bool, like: Tensor) -> Tensor:
    """Return weights along one axis, which fall linearly over `shared` positions at its ends.

    The outer quarter is 0: there a tile differs most from the whole, as its convolutions see zeros beyond its edge. Weights
    of neighbours add up to 1.
    """
    weights = torch.ones(length, device=like.device, dtype=like.dtype)
    if shared:
        slope = (torch.arange(shared, device=like.device, dtype=like.dtype) + 0.5) / shared
        slope = (2 * slope - 0.5).clamp(0, 1)
        if fade_in:
            weights[:shared] *= slope
        if fade_out:
            weights[-shared:] *= slope.flip(0)
    return weights
