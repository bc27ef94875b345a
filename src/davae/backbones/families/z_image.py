"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Masked, Parts, is_fake, stacked


class ZImageCall(Masked):
    """Pictures and prompts as lists; the model counts time from noise to data and points that way."""

    TEXT_TOKENS = 512
    WIDTH = "cap_feat_dim"

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        # the pipeline writes into the list that it is given
        prompts, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, **options)
        return stacked(self, prompts)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        lengths = [mask.shape[1]] * len(mask) if is_fake(mask) else mask.sum(1).long().tolist()
        pictures = model(
            [latents[:, None] for latents in x_t],  # (c,1,h,w) each
            1 - t,
            [prompt[:length] for prompt, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([picture[:, 0] for picture in pictures])  # (B,c,h,w)

    def pack(self, latents: Tensor) -> Tensor:
        return latents
