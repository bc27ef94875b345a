"""The U-Nets of Stable Diffusion 1 and 2, and of SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, SizedCall, size_rows, with_null


class UNetCall(SizedCall):
    """Epsilon or v; CLIP's tokens, and for SDXL pooled embeddings with six numbers: original size, crop, target size."""

    TEXT_TOKENS = 77

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        encoded = pipeline.encode_prompt(
            captions,
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,  # for the negative that the pipeline takes by default
            **options,
        )
        pairs = zip(encoded[0::2], encoded[1::2], strict=True)  # (B,L,d), and pooled (B,e) for SDXL
        return tuple(with_null(captions, embeds, negative) for embeds, negative in pairs)

    def blank(self, config: Any) -> Parts:
        embeds = torch.empty(1, self.TEXT_TOKENS, config["cross_attention_dim"])
        if config["addition_embed_type"] != "text_time":
            return (embeds,)
        times = 6 * config["addition_time_embed_dim"]
        return embeds, torch.empty(1, config["projection_class_embeddings_input_dim"] - times)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, *pooled = parts
        added = None
        if pooled:
            size = size_rows(x_t, self.pixel_factor)  # (B,2)
            times = torch.cat([size, torch.zeros_like(size), size], dim=1)  # (B,6), nothing cropped
            added = {"text_embeds": pooled[0], "time_ids": times}
        return model(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]
