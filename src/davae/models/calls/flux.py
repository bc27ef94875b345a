"""FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.models.calls.base import JointAndPooled, Parts, positions


class FluxCall(JointAndPooled):
    """Tokens of 2x2 positions packed (c,2,2); the model scales timesteps itself; a distilled one takes guidance as input."""

    TEXT_TOKENS = 512
    GUIDANCE = 3.5  # the pipeline's default: what the distilled model is asked for while it trains

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=captions, prompt_2=None, **options)
        return embeds, pooled  # (B,L,d), (B,e)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, pooled = parts
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        guidance = torch.full_like(t, self.GUIDANCE) if config["guidance_embeds"] else None
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=positions(height, width).to(x_t),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)  # (B,c,h,w)

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
