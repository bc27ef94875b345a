"""Conditions of a family's transformer: prompts or classes.

Time runs from data to noise, as in `davae.losses`; the call of a model that counts time the other way turns it round.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from davae.backbones.families import family_of
from davae.backbones.null_tokens import draw_count, repeat_last_token
from davae.data.conditions import check_class_numbers
from davae.data.latent_cache.not_finite import ALWAYS, EMBEDDING, NULL_NOT_FINITE, check_many
from davae.data.latent_cache.read import CachedLatents
from davae.errors import DataError
from davae.pretrained.placement import send

logger = logging.getLogger(__name__)


class Conditioning(Protocol):
    """Call of one family with its conditions."""

    null: Any  # the condition of an unconditional prediction

    def guided_by(self, guidance: float) -> Conditioning | None:
        """Return this conditioning with another guidance input, None where the model has none."""
        ...

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw the other random values of a training step, or take those of sampling for None."""
        ...

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        """Return the family's prediction (B,c,h,w) at x_t (B,c,h,w) and t (B,)."""
        ...


class EmbeddedInStep:
    """Prompt embeddings computed in each step, in place of a cache's.

    A caption whose embedding is not finite is named in the log and trains as the empty caption does.

    Args:
        embedder: captions -> the text encoders' outputs, one tensor per kind, each (B,...).
    """

    def __init__(self, embedder: Callable[[list[str]], tuple[Tensor, ...]]):
        self.embedder = embedder
        self.asked = 0
        self._last: tuple[list[str], tuple[Tensor, ...]] = [], ()  # a second prediction of a step takes it again
        self.lost: dict[str, str] = {}  # captions without a finite embedding, and why

    @cached_property
    def null(self) -> tuple[Tensor, ...]:
        """Return the embeddings (1,...) of the empty caption in float32, loading the text encoders.

        Raises:
            DataError: they are not finite.
        """
        parts = tuple(part.float() for part in self.embedder([""]))
        if not bool(rows_are_finite(parts).all()):
            raise DataError(NULL_NOT_FINITE)
        return parts

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Return the embeddings of captions in float32, each distinct caption embedded once.

        Raises:
            DataError: those of the empty caption are not finite, or those of many others.
        """
        if captions == self._last[0]:
            return self._last[1]
        distinct = list(dict.fromkeys(captions))
        rows = torch.tensor([distinct.index(caption) for caption in captions])
        parts = tuple(part.float() for part in self.embedder(distinct))
        good = rows_are_finite(parts)
        self.asked += len(distinct)
        if not bool(good.all()):
            self._note([caption for caption, fine in zip(distinct, good.tolist(), strict=True) if not fine])
            parts = tuple(
                torch.where(good.reshape(-1, *[1] * (part.ndim - 1)), part, null)
                for part, null in zip(parts, self.null, strict=True)
            )
        self._last = list(captions), tuple(part[rows.to(part.device)] for part in parts)
        return self._last[1]

    def _note(self, captions: list[str]) -> None:
        for caption in captions:
            if caption not in self.lost:
                self.lost[caption] = f"{EMBEDDING}: '{caption[:60]}'"
                logger.warning(
                    "%s; its image trains as one without a caption (%d so far)", self.lost[caption], len(self.lost)
                )
        check_many(self.lost, self.asked, 4 * ALWAYS)


def embed_in_step(conditioning: Any, embedder: Callable[[list[str]], tuple[Tensor, ...]]) -> None:
    """Let a conditioning embed its captions in each step, and load the text encoders now.

    In the first step the processes of a machine would load them one after another, and those of other machines wait.

    Raises:
        DataError: the embedding of the empty caption is not finite.
    """
    embedded = EmbeddedInStep(embedder)
    embedded.null  # noqa: B018
    conditioning.cache = embedded


def rows_are_finite(parts: tuple[Tensor, ...]) -> Tensor:
    """Return which rows are finite in all tensors (B,...): (B,) booleans."""
    return torch.stack([torch.isfinite(part).flatten(1).all(1) for part in parts]).all(0)


class BatchCaption(str):
    """A caption whose embeddings came with its batch.

    Attributes:
        text: the batch's embeddings, one tensor (B,...) per kind.
        row: the caption's place in them.
    """

    text: tuple[Tensor, ...]
    row: int


def of_batch(captions: list[str], text: tuple[Tensor, ...]) -> list[BatchCaption]:
    """Return a batch's captions with its embeddings, one tensor (B,...) per kind."""
    found = [BatchCaption(caption) for caption in captions]
    for row, one in enumerate(found):
        one.text, one.row = text, row
    return found


class TextConditioning:
    """Prompts, embedded once in the cache."""

    null = ""

    def __init__(
        self,
        transformer: nn.Module,
        cache: CachedLatents,
        device: torch.device,
        *,
        null_text: bool,
        pixel_factor: int,
        scheduler: Any,
        guidance: float = 1.0,
    ):
        self.cache, self.device = cache, device
        self.call = family_of(transformer).require_call().for_pipeline(pixel_factor, scheduler)
        self.distilled = bool(transformer.config.get("guidance_embeds"))  # type: ignore[union-attr, operator]
        self._set_guidance(guidance)
        self.config = transformer.config
        self.processor = repeat_last_token(transformer) if null_text else None
        self._null: tuple[Tensor, ...] | None = None  # of the empty caption, (1,...)

    def draw(self, generator: torch.Generator | None) -> None:
        if self.processor is not None:
            self.processor.count = 1 if generator is None else draw_count(generator)

    def _set_guidance(self, guidance: float) -> None:
        if self.distilled:
            self.call = copy.copy(self.call)
            vars(self.call)["GUIDANCE"] = guidance  # calls may be frozen dataclasses

    def guided_by(self, guidance: float) -> TextConditioning | None:
        if not self.distilled:
            return None
        other = copy.copy(self)
        other._set_guidance(guidance)
        return other

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, conditions: list[str]) -> Tensor:
        return self.call.predict(model, self.config, x_t, t, self.parts(conditions))

    def parts(self, conditions: list[str]) -> tuple[Tensor, ...]:
        """Return the embeddings (B,...) of captions in float32 on the device, one tensor per kind.

        Those of a batch are sent as they came; only what replaces a caption that was dropped is looked up.
        """
        text = next((caption.text for caption in conditions if isinstance(caption, BatchCaption)), None)
        if text is None:
            return tuple(send(part, self.device) for part in self.cache.embed(conditions))
        found = tuple(send(part, self.device).float() for part in text)
        dropped = torch.tensor([not isinstance(caption, BatchCaption) for caption in conditions])
        if not bool(dropped.any()):
            return found
        if self._null is None:
            self._null = tuple(send(part, self.device) for part in self.cache.embed([self.null]))
        mask = send(dropped, self.device)
        return tuple(
            torch.where(mask.reshape(-1, *[1] * (part.ndim - 1)), null, part)
            for part, null in zip(found, self._null, strict=True)
        )


class ClassConditioning:
    """Class numbers, of which the one after the last is the null class."""

    def __init__(self, transformer: nn.Module, num_classes: int, device: torch.device):
        self.null, self.device = num_classes, device
        self.call, self.config = family_of(transformer).require_call(), transformer.config

    def draw(self, generator: torch.Generator | None) -> None:
        """Nothing else is random."""

    def guided_by(self, guidance: float) -> None:
        """Classes are guided by two passes alone."""

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, conditions: list[int]) -> Tensor:
        labels = send(torch.tensor(conditions), self.device)
        return self.call.predict(model, self.config, x_t, t, (labels,))


def conditioning(
    transformer: nn.Module,
    cache: CachedLatents,
    device: torch.device,
    *,
    null_text: bool = False,
    pixel_factor: int = 8,
    scheduler: Any = None,
    guidance: float = 1.0,
) -> Conditioning:
    """Return the conditioning of a transformer's family.

    Args:
        transformer: stock or expanded.
        cache: embeds captions, holds labels.
        device: of the training.
        null_text: the prompt's last token replaces many equal ones (SD3 whose T5 outputs zeros).
        pixel_factor: pixels per latent position, for models whose input is the size of the image.
        scheduler: the pipeline's, for models whose input is the time before its shift.
        guidance: the input of models into which guidance was distilled.

    Raises:
        DataError: labels that are not classes of a class-conditional transformer.
    """
    family = family_of(transformer)
    if family.classes_key is None:
        return TextConditioning(
            transformer, cache, device, null_text=null_text, pixel_factor=pixel_factor, scheduler=scheduler,
            guidance=guidance,
        )  # fmt: skip
    num_classes = int(transformer.config[family.classes_key])  # type: ignore[index]
    check_class_numbers(cache.conditions, num_classes, "the training set")
    return ClassConditioning(transformer, num_classes, device)
