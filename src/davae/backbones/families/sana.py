"""SANA, SANA-1.5 and SANA-Sprint."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, PlainLatents, masked_with_null


class SanaCall(PlainLatents):
    """Masked prompts behind the pipeline's instruction to elaborate them; timesteps to 1000 times the config's scale."""

    TEXT_TOKENS = 300
    GUIDANCE = 4.5  # the pipeline's default, where guidance is an input (SANA-Sprint)

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        encoded = pipeline.encode_prompt(
            captions,
            "" in captions,
            negative_prompt=captions,
            complex_human_instruction=instruction,
            **options,
        )
        return masked_with_null(captions, *encoded)  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["caption_channels"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        guidance = torch.full_like(t, self.GUIDANCE) * config["guidance_embeds_scale"]
        return model(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=t * 1000 * config["timestep_scale"],
            guidance=guidance if config["guidance_embeds"] else None,
            return_dict=False,
        )[0]
