"""Places to read a model's configs from when the hub may be out of reach."""

from __future__ import annotations

from pathlib import Path

from davae.errors import ModelError
from davae.pretrained.open import read_config
from davae.zoo.presets import find_preset


def readable(model: str) -> tuple[str, str]:
    """Return where to read a model's configs, and a sentence on it where that is its preset.

    A preset is read where the hub does not give the model. Weights are never replaced: training needs an id or a folder.
    """
    preset = find_preset(model)
    if preset is None or model == preset.name or Path(model).is_dir():
        return model, ""
    try:
        read_config(model, "", "model_index.json")  # of the local cache or the hub
    except ModelError:
        return preset.name, f"the hub did not give {model}: these are the configs of the preset {preset.name}"
    return model, ""
