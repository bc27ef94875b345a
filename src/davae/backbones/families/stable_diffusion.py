"""Stable Diffusion 3 and 3.5, and the U-Nets of Stable Diffusion 1 and 2 and of SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import JointAndPooled, Parts, SizedCall, size_rows, with_null
from davae.backbones.family import ATTENTION, DDPM, JOINT, MLP, OUT, PC, TEXT_MLP, Family


class StableDiffusion3Call(JointAndPooled):
    """Call of Stable Diffusion 3 with joint and pooled embeddings and timesteps to 1000."""

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


class UNetCall(SizedCall):
    """Call of U-Nets, which predict epsilon or v from CLIP's tokens.

    SDXL also takes pooled embeddings and original size, crop and target size.
    """

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


STABLE_DIFFUSION = (
    Family(
        "SD3Transformer2DModel",
        pipeline="StableDiffusion3Pipeline",
        embedder="pos_embed.proj",
        head="proj_out",
        head_order=PC,
        lora_targets=(*ATTENTION, *JOINT, *MLP, *TEXT_MLP),
        attributes=OUT,
        blocks="transformer_blocks",
        call=StableDiffusion3Call(),
    ),
    Family(
        "UNet2DConditionModel",
        pipeline="StableDiffusionPipeline",
        embedder="conv_in",
        head="conv_out",
        head_order=PC,
        lora_targets=(*ATTENTION, *MLP, "proj_in"),
        component="unet",
        variants=("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"),
        objectives=DDPM,
        patch_key=None,
        call=UNetCall(),
    ),
)
