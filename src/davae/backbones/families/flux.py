"""FLUX.1 and its relatives, FLUX.2, Chroma, Ovis-Image, LongCat-Image and Bria.

All pack 2x2 latent positions into one token, channels outermost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Joint, JointAndPooled, Masked, Packed, PackedGrid, Parts
from davae.backbones.family import ATTENTION, CP, FLUX_LAYERS, JOINT, OUT, Family


class FluxCall(Packed, JointAndPooled):
    """Call of FLUX.1 with joint and pooled embeddings.

    Timesteps are in (0,1). A guidance-distilled model takes the guidance scale as an input.
    """

    TEXT_TOKENS = 512
    GUIDANCE = 3.5  # the pipeline's default; stage 2 sets its own

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=captions, prompt_2=None, **options)
        return embeds, pooled  # (B,L,d), (B,e)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, pooled = parts
        guidance = torch.full_like(t, self.GUIDANCE) if config["guidance_embeds"] else None
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=self.grid(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class ChromaCall(Packed, Masked):
    """Chroma: FLUX.1 without pooled embeddings and guidance, with a mask over the text."""

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        encoded = pipeline.encode_prompt(prompt=captions, do_classifier_free_guidance=False, **options)
        embeds, _, mask = encoded[:3]
        return embeds, mask  # (B,L,d), (B,L)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        packed, img_ids = self.pack(x_t), self.grid(x_t)
        tokens = model(
            hidden_states=packed,  # (B,hw/4,4c)
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=img_ids,
            # numbers, not truth values: the pipeline adds them to the attention's logits
            attention_mask=torch.cat([mask.to(x_t), x_t.new_ones(packed.shape[:2])], dim=1),  # (B,L+hw/4)
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


def text_diagonal(length: int, like: Tensor) -> Tensor:
    """Return (L,3), the positions 0, i, i of token i.

    Text runs along the diagonal of the image's positions.
    """
    return F.pad(torch.arange(length, device=like.device)[:, None].expand(-1, 2), (1, 0)).to(like)


class FluxLikeCall(Packed, Joint):
    """Call of Ovis-Image, LongCat-Image and Bria.

    They have one text encoder, no pooled embeddings and no guidance input.

    Attributes:
        TIMES: timestep of pure noise.
    """

    TIMES = 1.0

    def text_ids(self, embeds: Tensor, x_t: Tensor) -> Tensor:
        """Return (L,3), the positions of the text (B,L,d)."""
        return text_diagonal(embeds.shape[1], x_t)

    def image_ids(self, x_t: Tensor) -> Tensor:
        """Return (hw/4,3), the positions of the image's tokens."""
        return self.grid(x_t)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t * self.TIMES,
            encoder_hidden_states=embeds,
            txt_ids=self.text_ids(embeds, x_t),
            img_ids=self.image_ids(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class OvisImageCall(FluxLikeCall):
    """Ovis-Image: text positions run along the diagonal."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return (embeds,)  # (B,L,d)


class LongCatImageCall(FluxLikeCall):
    """Call of LongCat-Image, with text positions as in Ovis-Image.

    The first entry of an image position is 1. Rows and columns begin where the longest text ends.
    """

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _ = pipeline.encode_prompt(captions)
        return (embeds,)  # (B,L,d)

    def image_ids(self, x_t: Tensor) -> Tensor:
        return self.grid(x_t) + x_t.new_tensor([1, self.TEXT_TOKENS, self.TEXT_TOKENS])


class BriaCall(FluxLikeCall):
    """Call of Bria with timesteps to 1000.

    The pipeline guides away from zeros, so a dropped caption is embedded as zeros.
    """

    TEXT_TOKENS = 128
    TIMES = 1000.0

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        given = torch.tensor([bool(caption) for caption in captions], device=embeds.device)
        return (embeds * given[:, None, None],)  # (B,L,d)

    def text_ids(self, embeds: Tensor, x_t: Tensor) -> Tensor:
        return torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype)


class Flux2Call(PackedGrid, Joint):
    """Call of the guidance-distilled FLUX.2 and of FLUX.2 Klein.

    Positions are (time, row, column, place in the text).
    """

    TEXT_TOKENS = 512
    GUIDANCE = 4.0  # the pipeline's default; stage 2 sets its own

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


FLUX = (
    Family(
        "FluxTransformer2DModel",
        pipeline="FluxPipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        packed=4,
        attributes=OUT,
        guidance="true_cfg_scale",
        negative_prompts=True,
        call=FluxCall(),
    ),
    Family(
        "Flux2Transformer2DModel",
        pipeline="Flux2Pipeline",
        variants=("Flux2KleinPipeline",),
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=(
            *ATTENTION,
            *JOINT,
            "ff(_context)?.linear_(in|out)",
            "to_qkv_mlp_proj",
            r"single_\w+.\d+.attn.to_out",
        ),
        packed=4,
        attributes=OUT,
        call=Flux2Call(),
    ),
    Family(
        "ChromaTransformer2DModel",
        pipeline="ChromaPipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        packed=4,
        attributes=OUT,
        call=ChromaCall(),
    ),
    Family(
        "OvisImageTransformer2DModel",
        pipeline="OvisImagePipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        packed=4,
        attributes=OUT,
        call=OvisImageCall(),
    ),
    Family(
        "LongCatImageTransformer2DModel",
        pipeline="LongCatImagePipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        packed=4,
        attributes=OUT,
        negative_prompts=True,
        upgraded_pipelines=("DetailLongCatImagePipeline",),
        call=LongCatImageCall(),
    ),
    Family(
        "BriaTransformer2DModel",
        pipeline="BriaPipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        packed=4,
        attributes=OUT,
        call=BriaCall(),
    ),
)
