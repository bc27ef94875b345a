"""Features of a transformer's first blocks, computed without the blocks behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from davae.backbones.families import family_of


class _Reached(Exception):
    """The last block that was asked for has run."""


def first_blocks(transformer: nn.Module, depth: float) -> list[nn.Module]:
    """Return the first blocks of a transformer, a share of all and at least one.

    Args:
        transformer: of a family whose `blocks` are known.
        depth: share, in (0,1].
    """
    path = family_of(transformer).blocks
    assert path is not None  # the recipe's check has seen to it
    blocks = list(transformer.get_submodule(path).children())
    return blocks[: max(1, round(depth * len(blocks)))]


def block_features(blocks: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Run a forward pass to the last of some blocks and return their image tokens, (B,L,w).

    Args:
        blocks: in the order in which the pass runs them.
        run: the forward pass.
    """
    found: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:
        found.append(
            output[-1] if isinstance(output, tuple) else output
        )  # a joint block returns the text's tokens first
        if len(found) == len(blocks):
            raise _Reached

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        with contextlib.suppress(_Reached):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found
