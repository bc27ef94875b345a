"""PRX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, PlainLatents


class PRXCall(PlainLatents):
    """Masked prompts; timesteps from 0 to 1."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return embeds, mask  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["context_in_dim"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        return model(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=embeds,
            attention_mask=mask.bool(),
            return_dict=False,
        )[0]
