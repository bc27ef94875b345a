"""PixArt-alpha and PixArt-Sigma, Hunyuan-DiT, and SANA."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor, nn

from davae.backbones.call import Call, Parts, SizedCall, masked_with_null, size_rows
from davae.backbones.family import ATTENTION, DDPM, MLP, OUT, PC, Family


class PixArtCall(SizedCall):
    """Call of PixArt with the tokens and mask of T5.

    The model predicts epsilon and a variance. PixArt-alpha at 1024 pixels also takes size and aspect ratio.
    """

    TEXT_TOKENS = 300  # Sigma's; alpha reads 120

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask, _, _ = pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, clean_caption=True, **options
        )
        return embeds, mask  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["caption_channels"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        by_size = config["use_additional_conditions"]
        if by_size is None:
            by_size = config["sample_size"] == 128  # as the model itself decides
        size = size_rows(x_t, self.pixel_factor)  # (B,2)
        added = {
            "resolution": size if by_size else None,
            "aspect_ratio": size[:, :1] / size[:, 1:] if by_size else None,
        }
        return model(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0][:, : x_t.shape[1]]


# pixels per latent position in the pretrained Hunyuan-DiT; its pipeline has the number in its code
HUNYUAN_FACTOR = 8


def rotary_table(config: Any, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return Hunyuan-DiT's rotary positions, resized and cropped from the 512-pixel grid.

    Args:
        config: the transformer's.
        height, width: of the latents.
        device: of the table.

    Returns:
        cos and sin, each (L,head).
    """
    grid = (height // config["patch_size"], width // config["patch_size"])
    base = 512 // HUNYUAN_FACTOR // config["patch_size"]
    table: Any = get_2d_rotary_pos_embed(
        config["attention_head_dim"],
        get_resize_crop_region_for_grid(grid, base),
        grid,
        device=device,
        output_type="pt",
    )
    return table


class HunyuanDiTCall(Call):
    """Call of Hunyuan-DiT with tokens and masks of CLIP and T5.

    The model predicts v and a variance. Sizes are those of the base's resolution, not of the upgraded one.
    """

    TEXT_TOKENS = 256  # T5's
    TEXT_LENGTHS = (77, TEXT_TOKENS)
    ORIGINAL = 1024  # the pipeline's default for the size of the original image

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
        target = size_rows(x_t, HUNYUAN_FACTOR)  # (B,2)
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


class SanaCall(Call):
    """Call of SANA with masked prompts after the pipeline's instruction.

    Timesteps go to 1000 times the scale in the config.
    """

    TEXT_TOKENS = 300
    GUIDANCE = 4.5  # the pipeline's default, where guidance is an input (SANA-Sprint)

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        encoded = pipeline.encode_prompt(
            captions,
            "" in captions,
            negative_prompt=captions,
            complex_human_instruction=instruction,
            **options,
        )
        return masked_with_null(captions, *encoded)  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["caption_channels"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        guidance = torch.full_like(t, self.GUIDANCE) * config["guidance_embeds_scale"]
        return model(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=t * 1000 * config["timestep_scale"],
            guidance=guidance if config["guidance_embeds"] else None,
            return_dict=False,
        )[0]


PIXART = (
    Family(
        "PixArtTransformer2DModel",
        pipeline="PixArtAlphaPipeline",
        embedder="pos_embed.proj",
        head="proj_out",
        head_order=PC,
        lora_targets=(*ATTENTION, *MLP),
        attributes=OUT,
        objectives=DDPM,
        upgraded_pipelines=("DetailPixArtAlphaPipeline", "DetailPixArtSigmaPipeline"),
        variants=("PixArtSigmaPipeline",),
        call=PixArtCall(),
    ),
    Family(
        "HunyuanDiT2DModel",
        pipeline="HunyuanDiTPipeline",
        embedder="pos_embed.proj",
        head="proj_out",
        head_order=PC,
        lora_targets=(*ATTENTION, *MLP),
        attributes=OUT,
        objectives=DDPM,
        upgraded_pipelines=("DetailHunyuanDiTPipeline",),
        call=HunyuanDiTCall(),
    ),
    Family(
        "SanaTransformer2DModel",
        pipeline="SanaPipeline",
        embedder="patch_embed.proj",
        head="proj_out",
        head_order=PC,
        lora_targets=(*ATTENTION, "ff.conv_inverted", "ff.conv_point"),
        # the pipeline picks its table of sizes by sample_size; positions are sample_size / interpolation_scale apart
        scaled_config=("sample_size", "interpolation_scale"),
        variants=("SanaSprintPipeline",),
        call=SanaCall(),
    ),
)
