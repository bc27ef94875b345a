"""Lumina-Next, Lumina-Image 2.0, Z-Image and ERNIE-Image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from davae.backbones.call import (
    Call,
    Masked,
    PackedGrid,
    Parts,
    is_fake,
    masked_with_null,
    padded_to,
    stacked,
    trimmed,
    unwrap,
)
from davae.backbones.family import ATTENTION, BOTH, CP, GATED, OUT, PC, SWIGLU, Family


class Lumina2Call(Call):
    """Call of Lumina-Image 2.0 with masked prompts.

    Prompts follow the pipeline's system prompt, which the empty prompt lacks.

    The model predicts data - noise and counts time from noise to data.
    """

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        encoded = pipeline.encode_prompt(captions, "" in captions, negative_prompt=captions, **options)
        return masked_with_null(captions, *encoded)  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["cap_feat_dim"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        if is_fake(x_t):
            _at_full_length(unwrap(model))
        return -model(
            hidden_states=x_t,
            timestep=1 - t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask.long(),
            return_dict=False,
        )[0]


def _at_full_length(model: Any) -> None:
    """Give the model whole prompts while FLOPs or memory are counted.

    The mask holds no values then.
    """
    embedder = model.rope_embedder
    stock = type(embedder).forward
    embedder.forward = lambda x, mask: stock(embedder, x, WholePrompts(mask.shape))


@dataclass(frozen=True)
class WholePrompts:
    """The part of a mask (B,L) that the model uses, for prompts that fill it."""

    shape: torch.Size

    def sum(self, dim: int) -> WholePrompts:
        return self

    def tolist(self) -> list[int]:
        return [self.shape[1]] * self.shape[0]


class LuminaNextCall(Call):
    """Call of Lumina-Next with masked prompts, padded to a multiple of 8 tokens.

    The rotary table and the attention scale follow the number of tokens.

    The model predicts data - noise and counts time from noise to data. Its head also returns a variance, which the pipeline
    drops; so the variance is not trained.
    """

    TEXT_TOKENS, MULTIPLE = 256, 8
    TABLE = 384  # positions each way in the pipeline's rotary tables

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        clean = inspect.signature(pipeline.__call__).parameters["clean_caption"].default
        rows = []
        for caption in captions:  # one by one: in a batch the padding of a prompt would depend on its neighbours
            embeds, mask, _, _ = pipeline.encode_prompt([caption], False, clean_caption=clean, **options)
            rows.append(padded_to(pipeline.max_sequence_length, embeds, mask))
        embeds, masks = zip(*rows, strict=True)
        return torch.cat(embeds), torch.cat(masks)  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        mask = torch.ones(1, self.TEXT_TOKENS, device="cpu")  # lengths are read from it: it must hold values
        return torch.empty(1, self.TEXT_TOKENS, config["cross_attention_dim"]), mask

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        last = mask.shape[1] if is_fake(mask) else int(mask.amax(0).nonzero().max()) + 1
        length = -(-last // self.MULTIPLE) * self.MULTIPLE  # the longest prompt's
        mask = mask[:, :length].long().to(x_t.device)
        scale = math.sqrt(x_t.shape[-2] * x_t.shape[-1]) / config["sample_size"]
        rotary = get_2d_rotary_pos_embed_lumina(
            config["hidden_size"] // config["num_attention_heads"],
            self.TABLE,
            self.TABLE,
            linear_factor=scale,
            ntk_factor=1.0,
        )
        both = model(
            hidden_states=x_t,
            timestep=1 - t,
            encoder_hidden_states=embeds[:, :length],
            encoder_mask=mask,
            image_rotary_emb=rotary,
            cross_attention_kwargs={"base_sequence_length": (config["sample_size"] // 2) ** 2},
            return_dict=False,
        )[0]  # (B,2c,h,w)
        return -both.chunk(2, dim=1)[0]


class ZImageCall(Masked):
    """Call of Z-Image with images and prompts as lists.

    The model predicts data - noise and counts time from noise to data.
    """

    TEXT_TOKENS = 512
    WIDTH = "cap_feat_dim"

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        # the pipeline writes into the list that it is given
        prompts, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, **options)
        return stacked(self, prompts)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        lengths = [mask.shape[1]] * len(mask) if is_fake(mask) else mask.sum(1).long().tolist()
        predicted = model(
            [latents[:, None] for latents in x_t],  # (c,1,h,w) each
            1 - t,
            [prompt[:length] for prompt, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([image[:, 0] for image in predicted])  # (B,c,h,w)


@contextmanager
def positions_left_out(model: Any) -> Iterator[None]:
    """Replace ERNIE-Image's position embedding within this context, on the meta device.

    It uses autocast, which the meta device lacks. Positions cost no FLOPs.
    """
    positions = model.pos_embed
    width = sum(positions.axes_dim)
    positions.forward = lambda ids: ids.new_empty(*ids.shape[:2], 1, width)
    try:
        yield
    finally:
        del positions.forward


class ErnieImageCall(PackedGrid, Masked):
    """Call of ERNIE-Image with prompts and their lengths.

    The model takes packed positions on their grid and timesteps to 1000.
    """

    TEXT_TOKENS = 512
    WIDTH = "text_in_dim"

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return stacked(self, pipeline.encode_prompt(captions, pipeline._execution_device))

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        lengths = mask.sum(1).long()  # (B,)
        embeds, _ = trimmed(embeds, mask)
        with positions_left_out(model) if x_t.is_meta else nullcontext():
            grid = model(
                hidden_states=self.pack(x_t),  # (B,4c,h/2,w/2)
                timestep=t * 1000,
                text_bth=embeds,
                text_lens=lengths,
                return_dict=False,
            )[0]
        return F.pixel_shuffle(grid, 2)  # (B,c,h,w)


LUMINA = (
    Family(
        "Lumina2Transformer2DModel",
        pipeline="Lumina2Pipeline",
        embedder="x_embedder",
        head="norm_out.linear_2",
        head_order=PC,
        lora_targets=(*ATTENTION, *SWIGLU),
        embedder_order=PC,
        attributes=OUT,
        upgraded_pipelines=("DetailLumina2Pipeline",),
        call=Lumina2Call(),
    ),
    Family(
        "LuminaNextDiT2DModel",
        pipeline="LuminaPipeline",
        embedder="patch_embedder.proj",
        head="norm_out.linear_2",
        head_order=PC,
        lora_targets=(*ATTENTION, *SWIGLU),
        attributes=BOTH,
        upgraded_pipelines=("DetailLuminaPipeline",),
        call=LuminaNextCall(),
    ),
    Family(
        "ZImageTransformer2DModel",
        pipeline="ZImagePipeline",
        embedder="all_x_embedder.2-1",
        head="all_final_layer.2-1.linear",
        head_order=PC,
        lora_targets=(*ATTENTION, *GATED),
        embedder_order=PC,
        attributes=BOTH,
        patch_key="all_patch_size",
        no_guidance=0.0,
        default_pixels=1024,
        upgraded_pipelines=("DetailZImagePipeline",),
        call=ZImageCall(),
    ),
    Family(
        "ErnieImageTransformer2DModel",
        pipeline="ErnieImagePipeline",
        embedder="x_embedder.proj",
        head="final_linear",
        head_order=CP,
        lora_targets=(*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
        packed=4,
        attributes=BOTH,
        default_pixels=1024,
        upgraded_pipelines=("DetailErnieImagePipeline",),
        call=ErnieImageCall(),
    ),
)
