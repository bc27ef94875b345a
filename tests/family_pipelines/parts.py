"""Text encoders and tokenizers of a few thousand parameters, shared by the builders."""

from __future__ import annotations

from typing import Any

from conftest import tiny_recipe
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from davae.train.base_text import build_text_encoder, build_tokenizer

PROMPTS = ["a red square", "a blue square"]


def clip_tokenizer(tokens: int = 8) -> Any:
    return build_tokenizer(PROMPTS, 600, tokens)


def clip_encoder() -> Any:
    """A CLIPTextModel without projection."""
    return CLIPTextModel(build_text_encoder(tiny_recipe().architecture, clip_tokenizer()).config)


def word_tokenizer(padding_side: str = "right", model_max_length: int = 512) -> Any:
    """A tokenizer of whole words: the prompts' and some others, all else unknown."""
    words = ["<pad>", "</s>", "<unk>", "<bos>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        padding_side=padding_side,
        model_max_length=model_max_length,
    )
