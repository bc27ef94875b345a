"""Chroma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Masked, Packed, Parts


class ChromaCall(Packed, Masked):
    """FLUX.1 without pooled embeddings and guidance; a mask over the text."""

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        encoded = pipeline.encode_prompt(prompt=captions, do_classifier_free_guidance=False, **options)
        embeds, _, mask = encoded[:3]
        return embeds, mask  # (B,L,d), (B,L)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        packed, img_ids = self.pack(x_t), self.grid(x_t)
        tokens = model(
            hidden_states=packed,  # (B,hw/4,4c)
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=img_ids,
            # numbers, not truth values: the pipeline adds them to the attention's logits
            attention_mask=torch.cat([mask.to(x_t), x_t.new_ones(packed.shape[:2])], dim=1),  # (B,L+hw/4)
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)
