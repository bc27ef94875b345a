"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, SizedCall, size_rows


class PixArtCall(SizedCall):
    """Epsilon and a variance; T5's tokens with their mask; alpha at 1024 pixels is also told size and aspect ratio."""

    TEXT_TOKENS = 300  # Sigma's; alpha reads 120

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask, _, _ = pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, clean_caption=True, **options
        )
        return embeds, mask  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["caption_channels"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        told = config["use_additional_conditions"]
        if told is None:
            told = config["sample_size"] == 128  # as the model itself decides
        size = size_rows(x_t, self.pixel_factor)  # (B,2)
        added = {
            "resolution": size if told else None,
            "aspect_ratio": size[:, :1] / size[:, 1:] if told else None,
        }
        return model(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0][:, : x_t.shape[1]]
