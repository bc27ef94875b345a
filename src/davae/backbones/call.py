"""What every family's way to be called has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Parts = tuple[Tensor, ...]


class Call(Protocol):
    """One family's way to be called."""

    def blank(self, config: Any) -> Parts:
        """Conditions of one picture of the usual length, uninitialised: what counting and planning need."""
        ...

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """What the family was trained to predict: velocity noise - data, epsilon, or v.

        Args:
            config: the transformer's own: wrappers hide it.
            x_t: noisy latents (B,c,h,w).
            t: (B,), in (0,1) with 1 noise for flow matching; 0 .. T-1 of the scheduler's training steps for epsilon and v.
            parts: the conditions, each (B,...).

        Returns:
            (B,c,h,w). Where the model also predicts a variance, its half is left out.
        """
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B,c,h,w) as the pipeline's `latents` argument takes them."""
        ...


class TextCall(Call, Protocol):
    """A call that is told prompts."""

    @property
    def TEXT_TOKENS(self) -> int:
        """Of a prompt, as the cache keeps it."""
        ...

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        """Prompt embeddings by the pipeline's own `encode_prompt`, one tensor per kind, each (B,...)."""
        ...


class PlainLatents:
    """The pipeline takes latents as they are."""

    def pack(self, latents: Tensor) -> Tensor:
        return latents


class ClassNumbers(PlainLatents):
    """Conditions are class numbers (B,)."""

    def blank(self, config: Any) -> Parts:
        return (torch.zeros(1, dtype=torch.long),)


@dataclass(frozen=True)
class SizedCall(PlainLatents):
    """A call whose model is told the size of the picture: `pixel_factor` pixels per latent position, each way.

    It is what the pipeline tells the model at that size, so an upgraded model is told the doubled one.
    """

    pixel_factor: int = 8


class JointAndPooled:
    """Prompts as joint embeddings (B,L,d) and pooled ones (B,e)."""

    TEXT_TOKENS: int

    def blank(self, config: Any) -> Parts:
        return (
            torch.empty(1, self.TEXT_TOKENS, config["joint_attention_dim"]),
            torch.empty(1, config["pooled_projection_dim"]),
        )


class Packed:
    """Tokens of 2x2 latent positions, (c,2,2)."""

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)  # (B,hw/4,4c)

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        """(B,hw/4,4c) -> (B,c,h,w), the size of `like`."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (like.shape[-2] // 2, like.shape[-1] // 2)), 2)

    def grid(self, like: Tensor) -> Tensor:
        """(hw/4,3): 0, row, column of every token of latents (B,c,h,w)."""
        return positions(like.shape[-2] // 2, like.shape[-1] // 2).to(like)


class PackedGrid(Packed):
    """The same tokens, which the pipeline takes still on their grid."""

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)  # (B,4c,h/2,w/2)


class Joint:
    """Prompts as joint embeddings (B,L,d) alone."""

    TEXT_TOKENS: int
    WIDTH = "joint_attention_dim"  # config key of d

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config[self.WIDTH]),)


class Masked(Joint):
    """Prompts as joint embeddings (B,L,d) of `TEXT_TOKENS` tokens with a mask (B,L), 1 for a token."""

    def blank(self, config: Any) -> Parts:
        return (*super().blank(config), torch.ones(1, self.TEXT_TOKENS))

    def padded(self, embeds: Tensor, mask: Tensor | None) -> Parts:
        """Both at `TEXT_TOKENS`, so that every batch of a cache has the same length; no mask means all tokens."""
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask.to(embeds)
        missing = self.TEXT_TOKENS - embeds.shape[1]  # negative where a pipeline cuts no prompt: the cache does
        return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def is_fake(tensor: Tensor) -> bool:
    """Whether FLOPs or memory are being counted, with tensors that hold no values: masks then stand for whole prompts."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def inner(model: nn.Module) -> Any:
    """The transformer itself, whose parts are reached into, where a wrapper stands around it."""
    return getattr(model, "module", model)


def trimmed(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B,L,d) and mask (B,L) without the end that no prompt of the batch reaches, as pipelines pad them; no mask
    where every token counts."""
    if is_fake(mask):
        return embeds, None
    reached = int(mask.any(0).nonzero().max()) + 1
    embeds, mask = embeds[:, :reached], mask[:, :reached]
    return embeds, None if bool(mask.all()) else mask


def stacked(call: Masked, prompts: list[Tensor]) -> Parts:
    """Prompts of different lengths, (L_i,d) each, as embeddings and mask of a call."""
    embeds, masks = zip(*(call.padded(prompt[None], None) for prompt in prompts), strict=True)
    return torch.cat(embeds), torch.cat(masks)  # (B,L,d), (B,L)


def with_null(captions: list[str], embeds: Tensor, negative: Tensor) -> Tensor:
    """Embeddings (B,...) in which the empty caption is what the pipeline guides away from by default, zeros in some.

    Dropped captions are replaced by the empty one, so training and guidance mean the same by none.
    """
    empty = torch.tensor([caption == "" for caption in captions], device=embeds.device)
    return torch.where(empty.reshape(-1, *[1] * (embeds.ndim - 1)), negative, embeds)


def masked_with_null(
    captions: list[str], embeds: Tensor, mask: Tensor, negative: Tensor | None, negative_mask: Tensor | None
) -> Parts:
    """The same of embeddings (B,L,d) and mask (B,L), as `encode_prompt` gives them; without a negative none is empty."""
    if negative is None or negative_mask is None:
        return embeds, mask
    return with_null(captions, embeds, negative), with_null(captions, mask, negative_mask)


def size_rows(x_t: Tensor, factor: int) -> Tensor:
    """(B,2): height and width in pixels of latents (B,c,h,w) at `factor` pixels per position."""
    return x_t.new_tensor([[x_t.shape[-2] * factor, x_t.shape[-1] * factor]]).expand(len(x_t), 2)


def positions(height: int, width: int) -> Tensor:
    """(height*width,3): 0, row, column of every token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
