"""Exact attention of Stable Diffusion 3 with many identical text tokens as one.

It is for models whose T5 returns zeros.

Its pipeline then appends `max_sequence_length` (256 by default) zero embeddings. They are equal at the input and have
no positions, so they stay equal in every block; n equal keys in a softmax weigh as one key with log n added to
its logit. Training with one such token and a drawn n costs a token instead of 256, and the model then serves any
`max_sequence_length`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class RepeatedTokenAttnProcessor:
    """Joint attention of SD3 in which the last context token counts as `count` equal ones."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor] | Tensor:
        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B,L,H*d) -> (B,H,L,d)
            return x if norm is None else norm(x)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        mask = None
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], dim=2)
            mask = key.new_zeros(1, 1, 1, key.shape[2])
            mask[..., -1] = math.log(self.count)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B,H,L,d) -> (B,L,H*d)
        image = mixed[:, : hidden_states.shape[1]]
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, hidden_states.shape[1] :]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def repeat_last_token(transformer: nn.Module) -> RepeatedTokenAttnProcessor:
    """Install one shared processor in every attention of `transformer` and return it.

    Set its `count` before a forward pass.
    """
    processor = RepeatedTokenAttnProcessor()
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)  # type: ignore[arg-type]
    return processor


def draw_count(generator: torch.Generator, maximum: int = 256) -> int:
    """Return a log-uniform number in 1..maximum."""
    return round(math.exp(float(torch.rand((), generator=generator)) * math.log(maximum)))
