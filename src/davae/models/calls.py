"""How each text-to-image transformer is called in a training step: its packing, timesteps, prompt embeddings.

All of these predict the velocity noise - data at x_t = (1-t) data + t noise, t in (0,1). A family that has no call here can
be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = tuple[Tensor, ...]


class TextCall(Protocol):
    """One family's way to be called."""

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        """Prompt embeddings by the pipeline's own `encode_prompt`, one tensor per kind, each (B,...)."""
        ...

    def blank(self, config: Any) -> Parts:
        """Embeddings of one prompt of the usual length, uninitialised: what counting and planning need."""
        ...

    def velocity(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """x_t (B,c,h,w), t (B,) -> (B,c,h,w). `config` is the transformer's own: wrappers hide it."""
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B,c,h,w) as the pipeline's `latents` argument takes them."""
        ...


class JointAndPooled:
    """Prompts as joint embeddings (B,L,d) and pooled ones (B,e)."""

    TEXT_TOKENS: int

    def blank(self, config: Any) -> Parts:
        return (
            torch.empty(1, self.TEXT_TOKENS, config["joint_attention_dim"]),
            torch.empty(1, config["pooled_projection_dim"]),
        )


class StableDiffusion3Call(JointAndPooled):
    """Latents as they are; joint embeddings and pooled ones; timesteps to 1000."""

    TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=captions, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, **options
        )
        return embeds, pooled  # (B,L,d), (B,e)

    def velocity(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, pooled = parts
        return model(
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def pack(self, latents: Tensor) -> Tensor:
        return latents


class FluxCall(JointAndPooled):
    """Tokens of 2x2 positions packed (c,2,2); the model scales timesteps itself; a distilled one takes guidance as input."""

    TEXT_TOKENS = 512
    GUIDANCE = 3.5  # the pipeline's default: what the distilled model is asked for while it trains

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=captions, prompt_2=None, **options)
        return embeds, pooled  # (B,L,d), (B,e)

    def velocity(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
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


def positions(height: int, width: int) -> Tensor:
    """(height*width,3): 0, row, column of every token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


CALLS: dict[str, TextCall] = {
    "SD3Transformer2DModel": StableDiffusion3Call(),
    "FluxTransformer2DModel": FluxCall(),
}
