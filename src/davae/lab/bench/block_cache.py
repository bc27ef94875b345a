"""First-block caching for transformers that diffusers' hooks do not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from davae.errors import ModelError


@dataclass
class Residuals:
    """Tensors (B,L,w) of the last pass that was computed whole."""

    threshold: float
    first: Tensor | None = None  # what the first block added
    after_first: Tensor | None = None
    rest: Tensor | None = None  # what all others added
    skipping: bool = False
    time: float = -1.0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: time runs down within a picture, so a later one starts the next picture."""
        time = float(kwargs["timestep"].flatten()[0])
        if time > self.time:
            self.first = self.after_first = self.rest = None
        self.time = time


def cached_block(
    forward: Callable[..., Any], state: Residuals, place: str, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Any, Tensor]:
    """Run one joint block and return its text states and image states.

    Args:
        place: first, middle or last.
    """
    text = kwargs.get("encoder_hidden_states", args[0] if args else None)
    if place == "first":
        text, hidden = forward(hidden_states, *args, **kwargs)
        added = hidden - hidden_states
        state.skipping = False
        if state.first is not None and state.rest is not None:
            change = (added - state.first).abs().mean() / state.first.abs().mean()
            state.skipping = bool(change < state.threshold)
        if not state.skipping:
            state.first, state.after_first = added, hidden
        return text, hidden
    if state.skipping:
        assert state.rest is not None
        return text, hidden_states + state.rest if place == "last" else hidden_states
    text, hidden = forward(hidden_states, *args, **kwargs)
    if place == "last":
        state.rest = hidden - state.after_first
    return text, hidden


@contextmanager
def first_block_cached(transformer: Any, threshold: float) -> Iterator[Residuals]:
    """Skip blocks after the first, in the context, while the first one's part barely changes.

    Args:
        transformer: with joint blocks in `transformer_blocks`, as SD3's.

    Raises:
        ModelError: another kind of transformer, or a single block.
    """
    blocks = getattr(transformer, "transformer_blocks", ())
    if type(transformer).__name__ != "SD3Transformer2DModel" or len(blocks) < 2:
        raise ModelError(f"{type(transformer).__name__} with {len(blocks)} blocks has no first-block cache")
    state = Residuals(threshold)
    hook = transformer.register_forward_pre_hook(state.begin, with_kwargs=True)
    places = ["first", *["middle"] * (len(blocks) - 2), "last"]
    for block, place in zip(blocks, places, strict=True):
        block.forward = partial(cached_block, block.forward, state, place)
    try:
        yield state
    finally:
        hook.remove()
        for block in blocks:
            del block.forward  # the class's own again
