"""The text encoders of a pipeline, from its configs alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from davae.models.calls import TEXT_CALLS
from davae.models.families import model_class
from davae.models.pipeline import COMPONENTS, read_config
from davae.models.stored import check_config, planned


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: its component's name, class and config, and the tokens that the stock pipeline pads a prompt to."""

    component: str
    class_name: str
    config: dict[str, Any]
    tokens: int

    def build(self) -> nn.Module:
        """Its modules with random weights, in eval mode."""
        kind = getattr(transformers, self.class_name)
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return kind(kind.config_class(**settings)).eval()

    def on_meta(self) -> nn.Module:
        """Its modules without weights."""
        with planned(f"{self.component} ({self.class_name})"):
            return self.build()


def text_encoders(model: str, transformer_config: dict[str, Any]) -> list[TextEncoder]:
    """Those of a diffusers folder, hub id or preset, in the pipeline's order; none for a class-conditional model."""
    index = read_config(model, "", "model_index.json")
    found = [
        (name, value[1])
        for name, value in index.items()
        if name.startswith("text_encoder")
        and isinstance(value, list)
        and len(value) == 2
        and isinstance(value[1], str)
    ]
    denoiser = next((index[part][1] for part in COMPONENTS if part in index), "")
    encoders = []
    for name, class_name in found:
        config = read_config(model, name)
        check_config(config, f"{name} of model {model}")
        tokens = prompt_tokens(index["_class_name"], denoiser, class_name, config, transformer_config)
        encoders.append(TextEncoder(name, class_name, config, tokens))
    return encoders


def prompt_tokens(
    pipeline_class: str,
    transformer_class: str,
    class_name: str,
    config: dict[str, Any],
    transformer_config: dict[str, Any],
) -> int:
    """CLIP's own limit; else what the pipeline pads to by default; Hunyuan-DiT's transformer says its lengths itself; else
    what stage 2 embeds."""
    if class_name.startswith("CLIP"):
        return int(config["max_position_embeddings"])
    default = inspect.signature(model_class(pipeline_class).__call__).parameters.get("max_sequence_length")
    if default is not None and default.default is not None:
        return int(default.default)
    own = transformer_config.get("text_len" if class_name == "BertModel" else "text_len_t5")
    return int(own or TEXT_CALLS[transformer_class].TEXT_TOKENS)
