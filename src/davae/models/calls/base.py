"""What every family's way to be called has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


def with_null(captions: list[str], embeds: Tensor, negative: Tensor) -> Tensor:
    """Embeddings (B,...) in which the empty caption is what the pipeline guides away from by default, zeros in some.

    Dropped captions are replaced by the empty one, so training and guidance mean the same by none.
    """
    empty = torch.tensor([caption == "" for caption in captions], device=embeds.device)
    return torch.where(empty.reshape(-1, *[1] * (embeds.ndim - 1)), negative, embeds)


def size_rows(x_t: Tensor, factor: int) -> Tensor:
    """(B,2): height and width in pixels of latents (B,c,h,w) at `factor` pixels per position."""
    return x_t.new_tensor([[x_t.shape[-2] * factor, x_t.shape[-1] * factor]]).expand(len(x_t), 2)


def positions(height: int, width: int) -> Tensor:
    """(height*width,3): 0, row, column of every token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
