"""ERNIE-Image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Masked, PackedGrid, Parts, stacked, trimmed


@contextmanager
def positions_left_out(model: Any) -> Iterator[None]:
    """Its positions ask for autocast, which the meta device, where models are counted, does not know; they cost nothing."""
    positions = model.pos_embed
    width = sum(positions.axes_dim)
    positions.forward = lambda ids: ids.new_empty(*ids.shape[:2], 1, width)
    try:
        yield
    finally:
        del positions.forward


class ErnieImageCall(PackedGrid, Masked):
    """Packed positions on their grid, also for the model; timesteps to 1000; prompts with their lengths."""

    TEXT_TOKENS = 512
    WIDTH = "text_in_dim"

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return stacked(self, pipeline.encode_prompt(captions, pipeline._execution_device))

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        lengths = mask.sum(1).long()  # (B,)
        embeds, _ = trimmed(embeds, mask)
        with positions_left_out(model) if x_t.is_meta else nullcontext():
            grid = model(
                hidden_states=self.pack(x_t),  # (B,4c,h/2,w/2)
                timestep=t * 1000,
                text_bth=embeds,
                text_lens=lengths,
                return_dict=False,
            )[0]
        return F.pixel_shuffle(grid, 2)  # (B,c,h,w)
