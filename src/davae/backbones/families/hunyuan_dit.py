"""Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor, nn

from davae.backbones.call import Parts, PlainLatents, size_rows

FACTOR = 8  # pixels per latent position in the pretrained model; its pipeline has the number in its code


def rotary_table(config: Any, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (L,head), for latents of height x width: the base's 512-pixel grid, resized and cropped."""
    grid = (height // config["patch_size"], width // config["patch_size"])
    base = 512 // FACTOR // config["patch_size"]
    table: Any = get_2d_rotary_pos_embed(
        config["attention_head_dim"],
        get_resize_crop_region_for_grid(grid, base),
        grid,
        device=device,
        output_type="pt",
    )
    return table


class HunyuanDiTCall(PlainLatents):
    """v and a variance; tokens and masks of CLIP and T5; sizes of a picture at the base's resolution, not the doubled one."""

    TEXT_TOKENS = 256  # T5's
    TEXT_LENGTHS = (77, TEXT_TOKENS)
    ORIGINAL = 1024  # the pipeline's default for the size of the original picture

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        parts: list[Tensor] = []
        for index, tokens in enumerate(self.TEXT_LENGTHS):
            embeds, _, mask, _ = pipeline.encode_prompt(
                captions,
                dtype=pipeline.transformer.dtype,
                do_classifier_free_guidance=False,
                max_sequence_length=tokens,
                text_encoder_index=index,
                **options,
            )
            parts += [embeds, mask]
        return tuple(parts)  # (B,77,d), (B,77), (B,256,e), (B,256)

    def blank(self, config: Any) -> Parts:
        clip, t5 = self.TEXT_LENGTHS
        return (
            torch.empty(1, clip, config["cross_attention_dim"]),
            torch.ones(1, clip),
            torch.empty(1, t5, config["cross_attention_dim_t5"]),
            torch.ones(1, t5),
        )

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        clip, clip_mask, t5, t5_mask = parts
        target = size_rows(x_t, FACTOR)  # (B,2)
        original, crop = torch.full_like(target, self.ORIGINAL), torch.zeros_like(target)
        return model(
            x_t,
            t.to(x_t.dtype),  # the model computes in the timestep's dtype
            encoder_hidden_states=clip,
            text_embedding_mask=clip_mask,
            encoder_hidden_states_t5=t5,
            text_embedding_mask_t5=t5_mask,
            image_meta_size=torch.cat([original, target, crop], dim=1),  # (B,6)
            style=torch.zeros(len(x_t), dtype=torch.long, device=x_t.device),
            image_rotary_emb=rotary_table(config, x_t.shape[-2], x_t.shape[-1], x_t.device),
            return_dict=False,
        )[0][:, : x_t.shape[1]]
