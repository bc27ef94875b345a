"""Ovis-Image, LongCat-Image and Bria: FLUX.1's transformer with one text encoder, no pooled embeddings, no guidance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Joint, Packed, Parts


def text_diagonal(length: int, like: Tensor) -> Tensor:
    """(L,3): 0, i, i: text runs along the diagonal of the picture's positions."""
    return F.pad(torch.arange(length, device=like.device)[:, None].expand(-1, 2), (1, 0)).to(like)


class FluxLikeCall(Packed, Joint):
    """The call that these share; each says what differs."""

    TIMES = 1.0  # what the model counts a whole trajectory as

    def text_ids(self, embeds: Tensor, x_t: Tensor) -> Tensor:
        """(L,3): positions of the text (B,L,d)."""
        return text_diagonal(embeds.shape[1], x_t)

    def image_ids(self, x_t: Tensor) -> Tensor:
        """(hw/4,3): positions of the picture's tokens."""
        return self.grid(x_t)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t * self.TIMES,
            encoder_hidden_states=embeds,
            txt_ids=self.text_ids(embeds, x_t),
            img_ids=self.image_ids(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class OvisImageCall(FluxLikeCall):
    """Text positions run along the diagonal."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return (embeds,)  # (B,L,d)


class LongCatImageCall(FluxLikeCall):
    """As Ovis; the picture's positions have 1 in front and begin where the longest text ends."""

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _ = pipeline.encode_prompt(captions)
        return (embeds,)  # (B,L,d)

    def image_ids(self, x_t: Tensor) -> Tensor:
        return self.grid(x_t) + x_t.new_tensor([1, self.TEXT_TOKENS, self.TEXT_TOKENS])


class BriaCall(FluxLikeCall):
    """Timesteps to 1000. The pipeline guides away from zeros, so they are what a dropped caption becomes."""

    TEXT_TOKENS = 128
    TIMES = 1000.0

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        said = torch.tensor([bool(caption) for caption in captions], device=embeds.device)
        return (embeds * said[:, None, None],)  # (B,L,d)

    def text_ids(self, embeds: Tensor, x_t: Tensor) -> Tensor:
        return torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype)
