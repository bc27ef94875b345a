"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Packed, Parts


class Krea2Call(Packed):
    """Text from several layers of its encoder; one list of positions for text, all at 0, and picture."""

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask = pipeline.encode_prompt(captions, **options)
        return embeds, mask.to(embeds)  # (B,L,n,d), (B,L)

    def blank(self, config: Any) -> Parts:
        shape = (1, self.TEXT_TOKENS, config["num_text_layers"], config["text_hidden_dim"])
        return torch.empty(shape), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            encoder_hidden_states=embeds,
            timestep=t,
            position_ids=F.pad(self.grid(x_t).float(), (0, 0, embeds.shape[1], 0)),  # (L+hw/4,3)
            encoder_attention_mask=mask.bool(),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)
