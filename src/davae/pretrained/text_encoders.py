"""The text encoders of a pipeline, from its configs alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from torch import nn

from davae.backbones.classes_by_name import model_class
from davae.backbones.families import component_in, denoiser, family_by_class
from davae.pretrained.open import Configs, MissingPart, load_pipeline
from davae.pretrained.processors import load_processor
from davae.pretrained.prompting import silent_t5
from davae.pretrained.stored import check_config, loading, planned
from davae.zoo import split_revision

TokenCount = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: component, class, config, and the tokens a prompt is padded to."""

    component: str
    class_name: str
    config: dict[str, Any]
    tokens: int

    def build(self) -> nn.Module:
        """Return its modules with random weights, in eval mode."""
        kind = getattr(transformers, self.class_name)
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return kind(kind.config_class(**settings)).eval()

    def on_meta(self) -> nn.Module:
        """Return its modules without weights."""
        with planned(f"{self.component} ({self.class_name})"):
            return self.build()


def text_encoders(model: str | Configs, transformer_config: dict[str, Any]) -> list[TextEncoder]:
    """Return a pipeline's text encoders in its order, none for a class-conditional model.

    Args:
        model: a diffusers folder, hub id or preset, or its configs.
        transformer_config: config of its transformer.
    """
    configs = Configs.of(model)
    index = configs.index
    found = [
        (name, value[1])
        for name, value in index.items()
        if name.startswith("text_encoder")
        and isinstance(value, list)
        and len(value) == 2
        and isinstance(value[1], str)
    ]
    part = component_in(index)
    transformer_class = index[part][1] if part else ""
    encoders = []
    for name, class_name in found:
        config = configs.read(name)
        check_config(config, f"{name} of model {configs.model}")
        tokens = prompt_tokens(index["_class_name"], transformer_class, class_name, config, transformer_config)
        encoders.append(TextEncoder(name, class_name, config, tokens))
    return encoders


def prompt_tokens(
    pipeline_class: str,
    transformer_class: str,
    class_name: str,
    config: dict[str, Any],
    transformer_config: dict[str, Any],
) -> int:
    """Return the number of tokens to which the pipeline pads a prompt for one text encoder.

    It is taken from the first that exists: CLIP's `max_position_embeddings`, the default of the pipeline's
    `max_sequence_length`, `text_len` or `text_len_t5` of the transformer's config (Hunyuan-DiT), the family's
    `TEXT_TOKENS`.
    """
    if class_name.startswith("CLIP"):
        return int(config["max_position_embeddings"])
    default = inspect.signature(model_class(pipeline_class).__call__).parameters.get("max_sequence_length")
    if default is not None and default.default is not None:
        return int(default.default)
    own = transformer_config.get("text_len" if class_name == "BertModel" else "text_len_t5")
    return int(own or family_by_class(transformer_class).require_call().TEXT_TOKENS)


def token_limits(
    model: str | Configs, transformer_config: dict[str, Any]
) -> list[tuple[str, int, TokenCount | None]]:
    """Return the limit of every text encoder of a pipeline whose output is used.

    Args:
        model: a diffusers folder, hub id or preset, or its configs.
        transformer_config: config of its transformer.

    Returns:
        (component, tokens that it reads of a caption, captions -> tokens of each before anything is cut). The count is None
        where the pipeline has no tokenizer for it; the tokenizer is loaded when it is first called.
    """
    configs = Configs.of(model)
    index = configs.index
    found: list[tuple[str, int, TokenCount | None]] = []
    for encoder in text_encoders(configs, transformer_config):
        tokenizer = encoder.component.replace("text_encoder", "tokenizer")
        entry = index.get(tokenizer)
        if encoder.component == "text_encoder_3" and Path(configs.model).is_dir() and reads_silent_t5(configs):
            continue
        named = entry[-1] if isinstance(entry, list) and isinstance(entry[-1], str) else ""
        count = _counter(configs.model, tokenizer, named) if hasattr(transformers, named) else None
        found.append((encoder.component, encoder.tokens, count))
    return found


def pipeline_limits(pipeline: Any) -> list[tuple[str, int, TokenCount | None]]:
    """Return `token_limits` of a loaded pipeline, nothing for a class-conditional one."""
    found: list[tuple[str, int, TokenCount | None]] = []
    model = denoiser(pipeline)
    for name, encoder in pipeline.components.items():
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
        if not name.startswith("text_encoder") or encoder is None or tokenizer is None:
            continue
        if name == "text_encoder_3" and silent_t5(pipeline):
            continue
        kind, config = type(encoder).__name__, encoder.config.to_dict()
        tokens = prompt_tokens(type(pipeline).__name__, type(model).__name__, kind, config, dict(model.config))
        found.append((name, tokens, partial(count_tokens, tokenizer)))
    return found


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Return the tokens of each caption, special ones included, before anything is cut."""
    return [len(tokens) for tokens in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]


def _counter(model: str, component: str, class_name: str) -> TokenCount:
    """Return a function that counts the tokens of captions, special ones included."""

    @cache
    def tokenizer() -> Any:
        return load_processor(model, getattr(transformers, class_name), f"{component} of {model}", component)

    return lambda captions: count_tokens(tokenizer(), captions)


def load_text_encoders(model: str, component: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Load the pipeline of a folder or hub id without its transformer, to embed prompts.

    Args:
        component: the model's name in the pipeline; a stand-in takes its place, as some pipelines read its config
            (the width of an absent T5) or its type while they embed.
        config: its config.

    Raises:
        ModelError: when diffusers cannot load the rest.
    """
    pipeline = load_pipeline(model, dtype, without=(component,))
    setattr(pipeline, component, SimpleNamespace(config=FrozenDict(config), dtype=dtype))
    return pipeline


def reads_silent_t5(model: str | Configs) -> bool:
    """Return `silent_t5` of a model that is not loaded, from one small tensor.

    Args:
        model: a diffusers folder or hub id, or its configs.

    Raises:
        MissingPart: the tensor is in none of the encoder's files.
        ModelError: a file that is cut off, or a pointer of Git LFS.
    """
    configs = Configs.of(model)
    model, index = configs.model, configs.index
    if "text_encoder_3" not in index:
        return False
    if index["text_encoder_3"][1] is None:
        return True
    if Path(model).is_dir():
        folder = Path(model) / "text_encoder_3"
    else:
        from huggingface_hub import snapshot_download

        place, revision = split_revision(model)
        files = snapshot_download(place, revision=revision, allow_patterns="text_encoder_3/*.safetensors")
        folder = Path(files) / "text_encoder_3"
    name = "encoder.final_layer_norm.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with loading(f"model {model}: text_encoder_3/{file.name}"), safe_open(file, framework="pt") as stream:
            if name in set(stream.keys()):
                return not bool(stream.get_tensor(name).any())
    raise MissingPart(f"model {model}: no file of text_encoder_3 holds {name}")
