"""Text encoders and tokenizers of a few thousand parameters, shared by the builders."""

from __future__ import annotations

from typing import Any

from conftest import tiny_recipe
from transformers import CLIPTextModel

from davae.train.base_text import build_text_encoder, build_tokenizer

PROMPTS = ["a red square", "a blue square"]


def clip_tokenizer() -> Any:
    return build_tokenizer(PROMPTS, 600, 8)


def clip_encoder() -> Any:
    """A CLIPTextModel without projection."""
    return CLIPTextModel(build_text_encoder(tiny_recipe().architecture, clip_tokenizer()).config)
