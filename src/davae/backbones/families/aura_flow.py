"""AuraFlow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, PlainLatents


class AuraFlowCall(PlainLatents):
    """Prompts whose padding the pipeline sets to zero; timesteps from 0 to 1."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return (embeds,)  # (B,L,d)

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config["joint_attention_dim"]),)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        return model(x_t, encoder_hidden_states=embeds, timestep=t, return_dict=False)[0]
