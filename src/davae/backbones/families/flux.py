"""FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import JointAndPooled, Packed, Parts


class FluxCall(Packed, JointAndPooled):
    """Tokens of 2x2 positions packed (c,2,2); the model scales timesteps itself; a distilled one takes guidance as input."""

    TEXT_TOKENS = 512
    GUIDANCE = 3.5  # the pipeline's default; stage 2 puts its own in place

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=captions, prompt_2=None, **options)
        return embeds, pooled  # (B,L,d), (B,e)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, pooled = parts
        guidance = torch.full_like(t, self.GUIDANCE) if config["guidance_embeds"] else None
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=self.grid(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)
