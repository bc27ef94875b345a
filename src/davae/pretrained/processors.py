"""Tokenizers and image processors of untrusted folders: no code, no absurd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from davae.errors import ModelError
from davae.files.reading import read_object
from davae.pretrained.stored import check_config, loading
from davae.zoo import split_revision

CONFIGS = ("preprocessor_config.json", "processor_config.json")
CLIP_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")  # their prompts are padded to the tokenizer's length


def load_processor(model: str, kind: Any, what: str, part: str = "") -> Any:
    """Load what prepares a model's inputs: a tokenizer, an image processor, or both.

    Args:
        model: a folder or hub id.
        kind: its class, of transformers.
        what: how to call it in messages.
        part: its folder in the model; "" for the model itself.

    Raises:
        ModelError: none there, absurd sizes, or one that needs code of its folder.
    """
    for name in CONFIGS:
        file = Path(model) / part / name
        if file.is_file():
            check_config(read_object(file), f"{what}: {name}")
    name, revision = split_revision(model)
    options = {"revision": revision or "main"} | ({"subfolder": part} if part else {})
    with loading(what):
        return kind.from_pretrained(name, trust_remote_code=False, **options)


def check_tokenizers(pipeline: Any, what: str) -> None:
    """Refuse tokenizers that would pad prompts beyond what their CLIP text encoder reads.

    Raises:
        ModelError: names the tokenizer and both lengths.
    """
    for name, encoder in pipeline.components.items():
        if type(encoder).__name__ not in CLIP_ENCODERS:
            continue
        part = name.replace("text_encoder", "tokenizer")
        tokenizer = pipeline.components.get(part)
        tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        longest, read = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if not isinstance(longest, int) or isinstance(longest, bool) or not 0 < longest <= read:
            raise ModelError(
                f"{part} of {what}: model_max_length is {str(longest)[:40]}, and {name} reads {read} tokens; "
                f"correct {part}/tokenizer_config.json"
            )
