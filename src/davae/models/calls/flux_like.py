"""Ovis-Image, LongCat-Image and Bria: FLUX.1's transformer with one text encoder, no pooled embeddings, no guidance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.models.calls.base import Joint, Packed, Parts


def text_diagonal(length: int, like: Tensor) -> Tensor:
    """(L,3): 0, i, i: text runs along the diagonal of the picture's positions."""
    return F.pad(torch.arange(length, device=like.device)[:, None].expand(-1, 2), (1, 0)).to(like)


class OvisImageCall(Packed, Joint):
    """Text positions run along the diagonal."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return (embeds,)  # (B,L,d)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=text_diagonal(embeds.shape[1], x_t),
            img_ids=self.grid(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class LongCatImageCall(Packed, Joint):
    """As Ovis; the picture's positions have 1 in front and begin where the longest text ends."""

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _ = pipeline.encode_prompt(captions)
        return (embeds,)  # (B,L,d)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=text_diagonal(embeds.shape[1], x_t),
            img_ids=self.grid(x_t) + x_t.new_tensor([1, self.TEXT_TOKENS, self.TEXT_TOKENS]),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class BriaCall(Packed, Joint):
    """Timesteps to 1000. The pipeline guides away from zeros, so they are what a dropped caption becomes."""

    TEXT_TOKENS = 128

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        said = torch.tensor([bool(caption) for caption in captions], device=embeds.device)
        return (embeds * said[:, None, None],)  # (B,L,d)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t * 1000,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=self.grid(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)
