"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from davae.backbones.call import JointAndPooled, Parts


class StableDiffusion3Call(JointAndPooled):
    """Latents as they are; joint embeddings and pooled ones; timesteps to 1000."""

    TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=captions, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, **options
        )
        return embeds, pooled  # (B,L,d), (B,e)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
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
