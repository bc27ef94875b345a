"""Nucleus-Image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from davae.backbones.call import Masked, Packed, Parts, trimmed


class NucleusImageCall(Packed, Masked):
    """As Qwen-Image, but the model points from noise to data while it counts time to noise."""

    TEXT_TOKENS = 1024

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return self.padded(*pipeline.encode_prompt(captions, max_sequence_length=self.TEXT_TOKENS, **options))

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = trimmed(*parts)
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            img_shapes=[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)] * len(x_t),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=t,
            return_dict=False,
        )[0]
        return -self.unpack(tokens, x_t)
