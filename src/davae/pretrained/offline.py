"""Places to read a model's configs from when the hub may be out of reach."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from davae.errors import ModelError
from davae.pretrained.open import read_config
from davae.zoo.presets import Preset, find_preset

REACH_SECONDS = 5.0  # the client's own retries take half a minute


def readable(model: str) -> tuple[str, str]:
    """Return where to read a model's configs, and a sentence on it where that is its preset.

    A preset is read where the hub does not give the model.

    Weights are never replaced: training needs the hub id or a folder.
    """
    preset = find_preset(model)
    if preset is None or model == preset.name or Path(model).is_dir() or _hub_gives(model):
        return model, ""
    return preset.name, f"the hub did not give {model}: these are the configs of the preset {preset.name}"


def _hub_gives(model: str) -> bool:
    """Return whether the model's index is in the local cache or on the hub."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "model_index.json"), str):
        return True
    if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
        return False
    try:
        read_config(model, "", "model_index.json")
    except ModelError:
        return False
    return True


def _answers(url: str) -> bool:
    """Return whether a server or a proxy listens there."""
    if getproxies():
        return True
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), REACH_SECONDS).close()
    except OSError:
        return False
    return True


def preset_of(model: str) -> Preset | None:
    """Return the preset of a model's name, None for a folder."""
    return None if Path(model).is_dir() else find_preset(model)
