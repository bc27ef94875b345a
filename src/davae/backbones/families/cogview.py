"""CogView3-Plus and CogView4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from davae.backbones.call import Parts, SizedCall, is_fake, padded_to, size_rows, with_null
from davae.backbones.family import ATTENTION, CP, DDPM, MLP, Family


class CogView3PlusCall(SizedCall):
    """CogView3-Plus: v, from T5's tokens and original size, target size and crop in pixels."""

    TEXT_TOKENS = 224

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, negative = pipeline.encode_prompt(captions, do_classifier_free_guidance=True, **options)
        return (with_null(captions, embeds, negative),)  # (B,L,d)

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config["text_embed_dim"]),)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        side, known = max(x_t.shape[-2:]) // config["patch_size"], config["pos_embed_max_size"]
        # diffusers would stop at two tensors that do not fit
        if side > known:
            raise ValueError(
                f"CogView3-Plus knows positions of {known} tokens a side, an image of that size has {side}"
            )
        size = size_rows(x_t, self.pixel_factor)  # (B,2)
        return model(
            hidden_states=x_t,
            encoder_hidden_states=parts[0],
            timestep=t,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]


PUBLISHED_SCHEDULE = {
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_image_seq_len": 256,
    "base_shift": 0.25,
    "max_shift": 0.75,
}


@dataclass(frozen=True)
class CogView4Call(SizedCall):
    """Call of CogView4 with prompts of any multiple of 16 tokens, without a mask.

    The model also takes original size, target size and crop in pixels.

    Timesteps are those before the scheduler's shift: the pipeline gives the model u while the latents are at
    sigma = k u / (1 + (k - 1) u), with k from the number of image tokens.

    Attributes:
        schedule: config of the base pipeline's scheduler.
    """

    schedule: Mapping[str, Any] = field(default_factory=PUBLISHED_SCHEDULE.copy)

    TEXT_TOKENS = 256  # longer captions are cut, with a warning in diffusers' log

    def for_pipeline(self, pixel_factor: int, scheduler: Any) -> Self:
        return replace(super().for_pipeline(pixel_factor, scheduler), schedule=scheduler.config)

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        rows = []
        for caption in captions:  # one by one: nothing masks the padding that neighbours would bring
            embeds, _ = pipeline.encode_prompt(
                [caption], do_classifier_free_guidance=False, max_sequence_length=self.TEXT_TOKENS, **options
            )
            rows.append(padded_to(self.TEXT_TOKENS, embeds, torch.ones(embeds.shape[:2])))
        embeds, masks = zip(*rows, strict=True)
        return torch.cat(embeds), torch.cat(masks)  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        # lengths are read from the mask: it must hold values also where nothing else does
        mask = torch.ones(1, self.TEXT_TOKENS, device="cpu")
        return torch.empty(1, self.TEXT_TOKENS, config["text_embed_dim"]), mask

    def shift(self, tokens: int) -> float:
        """Return k for an image of `tokens` tokens."""
        s = self.schedule
        if not s["use_dynamic_shifting"]:
            return s["shift"]
        mu = math.sqrt(tokens / s["base_image_seq_len"]) * s["max_shift"] + s["base_shift"]
        return mu if s["time_shift_type"] == "linear" else math.exp(mu)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        k = self.shift(x_t.shape[-2] * x_t.shape[-1] // config["patch_size"] ** 2)
        u = t / (t + k * (1 - t))  # (B,)
        lengths = mask.sum(1).long()
        each = [mask.shape[1]] if is_fake(mask) else lengths.unique().tolist()
        if len(each) == 1:
            return self._equal(model, x_t, u, embeds[:, : each[0]])
        velocity = torch.empty_like(x_t)
        # the model takes no mask that works: prompts of one length at a time
        for length in each:
            rows = (lengths == length).nonzero().flatten()
            velocity[rows] = self._equal(model, x_t[rows], u[rows], embeds[rows, :length]).to(velocity.dtype)
        return velocity

    def _equal(self, model: nn.Module, x_t: Tensor, u: Tensor, embeds: Tensor) -> Tensor:
        """Return the velocity (B,c,h,w) of latents whose prompts have one length."""
        size = size_rows(x_t, self.pixel_factor)  # (B,2)
        return model(
            hidden_states=x_t,
            encoder_hidden_states=embeds,
            timestep=u * 1000,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]


COGVIEW = (
    Family(
        "CogView4Transformer2DModel",
        pipeline="CogView4Pipeline",
        embedder="patch_embed.proj",
        head="proj_out",
        head_order=CP,
        lora_targets=(*ATTENTION, *MLP),
        call=CogView4Call(),
    ),
    Family(
        "CogView3PlusTransformer2DModel",
        pipeline="CogView3PlusPipeline",
        embedder="patch_embed.proj",
        head="proj_out",
        head_order=CP,
        lora_targets=(*ATTENTION, *MLP),
        attributes=("out_channels", "patch_embed.in_channels"),
        objectives=DDPM,
        call=CogView3PlusCall(),
    ),
)
