"""The call of a model family in a training step, with parts that several families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Parts = tuple[Tensor, ...]


class Call(ABC):
    """Call of the models of one family: their conditions, packing, timesteps and signs.

    Attributes:
        TEXT_TOKENS: tokens of a prompt in the latent cache; 0 where conditions are classes.
    """

    TEXT_TOKENS: int = 0

    def for_pipeline(self, pixel_factor: int, scheduler: Any) -> Self:
        """Return the call for the models of one pipeline.

        Most families need nothing of the pipeline and return themselves.

        Args:
            pixel_factor: pixels per latent position, each way.
            scheduler: the pipeline's scheduler.
        """
        return self

    @abstractmethod
    def blank(self, config: Any) -> Parts:
        """Return uninitialised conditions (1,...) of one image, to count and plan with.

        A prompt has its usual length.
        """

    @abstractmethod
    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """Return the model's prediction: the velocity noise - data, epsilon, or v.

        Args:
            model: the transformer, or a wrapper around it.
            config: the transformer's own config, which wrappers hide.
            x_t: noisy latents (B,c,h,w).
            t: (B,), in (0,1) with 1 noise for flow matching; 0 .. T-1 of the scheduler's training steps for epsilon and v.
                (B,2) of base and detail, for a model in which the detail has a time of its own.
            parts: the conditions, each (B,...).

        Returns:
            (B,c,h,w). Where the model also predicts a variance, that half is left out.
        """

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        """Return prompt embeddings of the pipeline's own `encode_prompt`, one (B,...) per kind.

        Args:
            pipeline: a pipeline with its text encoders; the transformer may be missing.
            captions: B prompts.
            options: further arguments of `encode_prompt`.

        Raises:
            NotImplementedError: a family whose conditions are classes.
        """
        raise NotImplementedError(f"{type(self).__name__} takes classes, not prompts")

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents (B,c,h,w) in the shape of the pipeline's `latents` argument."""
        return latents


class ClassNumbers(Call):
    """Conditions are class numbers (B,)."""

    def blank(self, config: Any) -> Parts:
        return (torch.zeros(1, dtype=torch.long),)


@dataclass(frozen=True)
class SizedCall(Call):
    """A call with the image's size in pixels among the model's inputs.

    Attributes:
        pixel_factor: pixels per latent position, each way. It comes from the pipeline, so that an upgraded model gets the
            doubled size in training as in sampling.
    """

    pixel_factor: int = 8

    def for_pipeline(self, pixel_factor: int, scheduler: Any) -> Self:
        return replace(self, pixel_factor=pixel_factor)


class JointAndPooled(Call):
    """Prompts as joint embeddings (B,L,d) and pooled embeddings (B,e)."""

    def blank(self, config: Any) -> Parts:
        return (
            torch.empty(1, self.TEXT_TOKENS, config["joint_attention_dim"]),
            torch.empty(1, config["pooled_projection_dim"]),
        )


class Packed(Call):
    """Tokens of 2x2 latent positions, each (c,2,2)."""

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)  # (B,hw/4,4c)

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return tokens (B,hw/4,4c) as latents (B,c,h,w) of the size of `like`."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (like.shape[-2] // 2, like.shape[-1] // 2)), 2)

    def grid(self, like: Tensor) -> Tensor:
        """Return (hw/4,3): 0, row and column of every token of latents (B,c,h,w)."""
        return positions(like.shape[-2] // 2, like.shape[-1] // 2).to(like)


class PackedGrid(Packed):
    """Tokens of 2x2 latent positions, which the pipeline takes on their grid."""

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)  # (B,4c,h/2,w/2)


class Joint(Call):
    """Prompts as joint embeddings (B,L,d) alone.

    Attributes:
        WIDTH: config key of d.
    """

    WIDTH = "joint_attention_dim"

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config[self.WIDTH]),)


class Masked(Joint):
    """Prompts as joint embeddings (B,L,d) of `TEXT_TOKENS` tokens with a mask (B,L).

    The mask is 1 for a token.
    """

    def blank(self, config: Any) -> Parts:
        return (*super().blank(config), torch.ones(1, self.TEXT_TOKENS))

    def padded(self, embeds: Tensor, mask: Tensor | None) -> Parts:
        """Return embeddings and mask of `TEXT_TOKENS` tokens, one length for every batch of a cache.

        Args:
            embeds: (B,L,d).
            mask: (B,L); None means that all L tokens count.
        """
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask.to(embeds)
        missing = self.TEXT_TOKENS - embeds.shape[1]  # negative where a pipeline cuts no prompt: the cache does
        return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor holds no values because FLOPs or memory are counted.

    Masks then mean whole prompts.
    """
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def unwrap(model: nn.Module) -> Any:
    """Return the transformer itself, whose submodules are needed, without the wrapper around it."""
    return getattr(model, "module", model)


def trimmed(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cut the end that no prompt of the batch reaches, as pipelines pad prompts.

    Args:
        embeds: (B,L,d).
        mask: (B,L), 1 for a token.

    Returns:
        Embeddings (B,l,d), and a mask (B,l) or None where every token counts.
    """
    if is_fake(mask):
        return embeds, None
    reached = int(mask.any(0).nonzero().max()) + 1
    embeds, mask = embeds[:, :reached], mask[:, :reached]
    return embeds, None if bool(mask.all()) else mask


def stacked(call: Masked, prompts: list[Tensor]) -> Parts:
    """Return B prompts of different lengths (L_i,d) as embeddings (B,L,d) and mask (B,L)."""
    embeds, masks = zip(*(call.padded(prompt[None], None) for prompt in prompts), strict=True)
    return torch.cat(embeds), torch.cat(masks)  # (B,L,d), (B,L)


def padded_to(length: int, embeds: Tensor, mask: Tensor) -> Parts:
    """Return embeddings (B,l,d) and mask (B,l) with zeros up to `length` tokens."""
    room = length - embeds.shape[1]
    return F.pad(embeds, (0, 0, 0, room)), F.pad(mask, (0, room))


def with_null(captions: list[str], embeds: Tensor, negative: Tensor) -> Tensor:
    """Replace the embeddings of empty captions by the pipeline's negative embeddings.

    Training drops a caption by replacing it with "". Giving "" the embeddings that the pipeline uses as its unconditional
    input (zeros in some pipelines) keeps training and guidance consistent.

    Args:
        captions: B captions.
        embeds, negative: (B,...) embeddings of the captions and of the negative prompt.
    """
    empty = torch.tensor([caption == "" for caption in captions], device=embeds.device)
    return torch.where(empty.reshape(-1, *[1] * (embeds.ndim - 1)), negative, embeds)


def masked_with_null(
    captions: list[str], embeds: Tensor, mask: Tensor, negative: Tensor | None, negative_mask: Tensor | None
) -> Parts:
    """Replace embeddings and masks of empty captions by the negative ones.

    The arguments after `captions` are in the order of `encode_prompt`'s results.

    Args:
        captions: B captions.
        embeds, mask: (B,L,d) and (B,L) of the captions.
        negative, negative_mask: (B,L,d) and (B,L) of the negative prompt; None where no caption is empty.
    """
    if negative is None or negative_mask is None:
        return embeds, mask
    return with_null(captions, embeds, negative), with_null(captions, mask, negative_mask)


def size_rows(x_t: Tensor, factor: int) -> Tensor:
    """Return (B,2), the pixel height and width of latents at `factor` pixels per position."""
    return x_t.new_tensor([[x_t.shape[-2] * factor, x_t.shape[-1] * factor]]).expand(len(x_t), 2)


def positions(height: int, width: int) -> Tensor:
    """Return (height*width,3): 0, row and column of every token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
