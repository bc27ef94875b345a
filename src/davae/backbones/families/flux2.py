"""FLUX.2, guidance-distilled, and FLUX.2 Klein."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Joint, Packed, PackedGrid, Parts


class Flux2Call(PackedGrid, Joint):
    """Positions are (time, row, column, place in the text)."""

    TEXT_TOKENS = 512
    GUIDANCE = 4.0  # the pipeline's default; stage 2 puts its own in place

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _ = pipeline.encode_prompt(prompt=captions, **options)
        return (embeds,)  # (B,L,d)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        batch, length = embeds.shape[:2]
        place = torch.arange(length, device=x_t.device)
        txt_ids = F.pad(place[:, None], (3, 0)).expand(batch, -1, -1)  # (B,L,4)
        img_ids = F.pad(self.grid(x_t).long(), (0, 1)).expand(batch, -1, -1)  # (B,hw/4,4)
        tokens = model(
            hidden_states=Packed.pack(self, x_t),  # (B,hw/4,4c)
            timestep=t,
            guidance=torch.full_like(t, self.GUIDANCE) if config["guidance_embeds"] else None,
            encoder_hidden_states=embeds,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)
