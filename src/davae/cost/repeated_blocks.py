"""Rehearse a few of a transformer's equal blocks for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

FEW = 2  # of every run of equal blocks: the first one may meet what no later one does
# models whose forward pass goes over its blocks one by one, whatever their number
UNIFORM = (
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "LightningDiT",
)
PLAIN = (bool, int, float, str, type(None))


def signature(block: nn.Module) -> tuple[Any, ...]:
    """Return everything that decides a block's work: classes, attributes, tensors, training."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, PLAIN))
        parts.append((name, type(module).__qualname__, module.extra_repr(), tuple(plain)))
    tensors = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in block.named_parameters()]
    tensors += [(name, tuple(b.shape), str(b.dtype), False) for name, b in block.named_buffers()]
    return (*parts, *tensors)


@dataclass(frozen=True)
class EqualBlocks:
    """Consecutive equal blocks.

    Attributes:
        kind: equal for runs that are shortened together.
    """

    blocks: list[nn.Module]
    kind: tuple[Any, ...]


class Repeats:
    """Runs of equal blocks of a model, which can be shortened.

    Models that are not known to allow it have none.

    Args:
        model: its lists of blocks are changed.
    """

    def __init__(self, model: nn.Module):
        self.lists: list[tuple[nn.ModuleList, list[EqualBlocks]]] = []
        if type(model).__name__ in UNIFORM:
            self._find(model)
        found = [run for _, runs in self.lists for run in runs]
        self.lengths = {run.kind: len(run.blocks) for run in found if len(run.blocks) > FEW + 1}

    def _find(self, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList) and len(module) > FEW + 1:
            runs: list[EqualBlocks] = []
            names = [signature(block) for block in module]
            for block, name in zip(module, names, strict=True):
                if runs and runs[-1].kind == name:
                    runs[-1].blocks.append(block)
                else:
                    runs.append(EqualBlocks([block], name))
            if any(len(run.blocks) > FEW + 1 for run in runs):
                self.lists.append((module, [EqualBlocks(run.blocks, (len(run.blocks), run.kind)) for run in runs]))
                return
        for child in module.children():
            self._find(child)

    def shorten(self, longer: tuple[Any, ...] | None = None, by: int = 1) -> None:
        """Leave `FEW` blocks of every long run, and `by` more of the runs of the kind `longer`."""
        for blocks, runs in self.lists:
            kept: list[nn.Module] = []
            for run in runs:
                few = FEW + (by if run.kind == longer else 0)
                kept += run.blocks[:few] if run.kind in self.lengths else run.blocks
            del blocks[:]
            blocks.extend(kept)

    def whole(self, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """Return figures of the whole model, from its short form and one more block of each kind.

        The figures must grow evenly with every run.
        """
        if not self.lengths:
            return measure()
        self.shorten()
        first = measure()
        totals = list(first)
        for kind, length in self.lengths.items():
            self.shorten(kind)
            for number, value in enumerate(measure()):
                totals[number] += (length - FEW) * (value - first[number])
        return tuple(totals)
