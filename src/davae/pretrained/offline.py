"""Places to read a model's configs from when the hub may be out of reach."""

from __future__ import annotations

from pathlib import Path

from davae.errors import ModelError
from davae.pretrained.open import read_config
from davae.zoo.presets import Preset, find_preset


def readable(model: str) -> tuple[str, str]:
    """Return where to read a model's configs, and a sentence on it where that is its preset.

    A preset is read where the hub does not give the model. Weights are never replaced: training needs an id or a folder.
    """
    preset = find_preset(model)
    if preset is None or model == preset.name or Path(model).is_dir() or _hub_gives(model):
        return model, ""
    return preset.name, f"the hub did not give {model}: these are the configs of the preset {preset.name}"


def _hub_gives(model: str) -> bool:
    """Return whether the model's index is in the local cache or on the hub."""
    try:
        read_config(model, "", "model_index.json")
    except ModelError:
        return False
    return True


def preset_of(model: str) -> Preset | None:
    """Return the preset of a model's name, None for a folder."""
    return None if Path(model).is_dir() else find_preset(model)
