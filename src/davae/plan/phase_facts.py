"""Sizes that the phases of an upgrade depend on, read from configs: parameters, text, images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from davae.backbones.families import family_by_class
from davae.data.sources import open_source
from davae.dataset.opened import source_options
from davae.errors import DataError
from davae.pretrained.open import BaseShapes, reads_silent_t5
from davae.pretrained.text_encoders import TextEncoder
from davae.recipes.sections import Data

ASSUMED_IMAGES = 500_000  # where the data is not on this machine
TYPICAL_TOKENS = 100  # of a long caption, where a mask lets the cache leave the padding out


@dataclass(frozen=True)
class TextFacts:
    """Prompts of one model.

    Attributes:
        parameters: of all text encoders.
        flops: of embedding one prompt.
        working_values: values that embedding one prompt holds at a time.
        padded_values, stored_values: of one prompt's embeddings, at full length and as the cache writes them.
    """

    parameters: int = 0
    flops: float = 0.0
    working_values: int = 0
    padded_values: int = 0
    stored_values: int = 0


@dataclass(frozen=True)
class ImageFacts:
    """How many images train, and whether they were counted or assumed."""

    count: int
    counted: bool


def count_images(data: Data, resolution: int) -> ImageFacts:
    """Return the number of training images: `data.limit`, those of a source on this machine, or an assumption."""
    kept = 1.0 - data.holdout
    here = data.source == "openmoji" or Path(data.source).exists()
    if here:
        try:
            found = len(open_source(data.source, resolution, source_options(data)))
        except DataError:
            found = 0
        if found:
            return ImageFacts(max(1, round(kept * min(found, data.limit or found))), True)
    return ImageFacts(max(1, round(kept * data.limit)) if data.limit else ASSUMED_IMAGES, data.limit is not None)


def encoder_facts(encoder: TextEncoder) -> tuple[int, float, int]:
    """(parameters, FLOPs of a prompt, values that a prompt's pass holds) of one text encoder.

    A pass takes two FLOPs a parameter and token. It holds a layer's residual stream, queries, keys, values, its feed-forward
    and the scores of one attention layer.
    """
    module = encoder.on_meta()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    hidden = max((m.in_features for m in linear if m.in_features == m.out_features), default=0) or 1024
    widest = max((m.out_features for m in linear if m.out_features <= 8 * hidden), default=hidden)  # no vocabulary
    heads = _heads(encoder.config)
    values = encoder.tokens * (6 * hidden + 3 * widest) + 2 * heads * encoder.tokens**2
    return parameters, 2.0 * parameters * encoder.tokens, values


def _heads(config: dict[str, Any]) -> int:
    """Attention heads of a transformers config; 32 where it has its own name for them."""
    for entry in (config, config.get("text_config") or {}):
        for name in ("num_attention_heads", "num_heads"):
            if isinstance(entry.get(name), int):
                return int(entry[name])
    return 32


def text_facts(model: str | None, shapes: BaseShapes, encoders: list[TextEncoder]) -> TextFacts:
    """Facts on a model's prompts; zeros for a class-conditional one."""
    family = family_by_class(shapes.transformer_class)
    if family.call is None or family.condition != "text" or not encoders:
        return TextFacts()
    found = [encoder_facts(encoder) for encoder in encoders]
    with torch.device("meta"):
        parts = [part.shape[1:] for part in family.call.blank(_Config(shapes.transformer_config))]
    masks = {shape[0] for shape in parts if len(shape) == 1}
    short = model is not None and Path(model).is_dir() and reads_silent_t5(model)
    padded = stored = 0
    for shape in parts:
        length, width = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape[0])
        if short and len(shape) > 1:
            length = encoders[0].tokens + 1  # one zero token instead of T5's
        padded += length * width
        stored += width * (min(length, TYPICAL_TOKENS) if shape[0] in masks and len(shape) > 1 else length)
    return TextFacts(
        parameters=sum(entry[0] for entry in found),
        flops=sum(entry[1] for entry in found),
        working_values=max(entry[2] for entry in found),
        padded_values=padded,
        stored_values=stored,
    )


class _Config(dict[str, Any]):
    """A transformer's config as its call reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]
