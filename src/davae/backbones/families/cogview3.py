"""CogView3-Plus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, SizedCall, size_rows, with_null


class CogView3PlusCall(SizedCall):
    """v; T5's tokens; original size, target size and crop in pixels."""

    TEXT_TOKENS = 224

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, negative = pipeline.encode_prompt(captions, do_classifier_free_guidance=True, **options)
        return (with_null(captions, embeds, negative),)  # (B,L,d)

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config["text_embed_dim"]),)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        side, known = max(x_t.shape[-2:]) // config["patch_size"], config["pos_embed_max_size"]
        if side > known:  # diffusers would stop at two tensors that do not fit
            raise ValueError(
                f"CogView3-Plus knows positions of {known} tokens a side, a picture of that size has {side}"
            )
        size = size_rows(x_t, self.pixel_factor)  # (B,2)
        return model(
            hidden_states=x_t,
            encoder_hidden_states=parts[0],
            timestep=t,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
