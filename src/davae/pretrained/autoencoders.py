"""Load a diffusers autoencoder, or a DetailVAE, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from davae.backbones.classes_by_name import model_class
from davae.errors import ModelError
from davae.files.checksums import check_folder
from davae.pretrained.open import MissingPart, read_config
from davae.pretrained.stored import load_component
from davae.vae.base import autoencoder_family
from davae.vae.codec import DETAIL
from davae.vae.detail_vae import DetailVAE
from davae.zoo import split_revision


def autoencoder_config(name: str) -> tuple[str, dict[str, Any]]:
    """Return the part of a model that holds its autoencoder ("" or "vae"), and its config.

    Raises:
        ModelError: nothing there.
    """
    try:
        return "", read_config(name, "")
    except ModelError as error:
        place, revision = split_revision(name)
        unreached = isinstance(error.__cause__, LocalEntryNotFoundError)  # a pipeline may be in the hub's cache
        cached = unreached and try_to_load_from_cache(place, "vae/config.json", revision=revision)
        if not isinstance(error, MissingPart) and not cached:
            raise
    return "vae", read_config(name, "vae")


def load_autoencoder(name: str) -> Any:
    """Load a DetailVAE or a supported diffusers autoencoder, in float32 and eval mode.

    Args:
        name: an autoencoder's folder, a folder with one in `vae/`, or a hub id of either.

    Raises:
        ModelError: nothing there, or a class that is not supported.
    """
    part, config = autoencoder_config(name)
    kind = str(config.get("_class_name"))
    if kind != DETAIL:
        try:
            autoencoder_family(kind)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from error
    check_folder(Path(name), part)
    return load_component(name, part, model_class(kind), torch.float32, f"autoencoder {name}")


def load_detail_vae(folder: Path, dtype: torch.dtype = torch.float32) -> DetailVAE:
    """Load a DetailVAE from its folder, in eval mode.

    Raises:
        ModelError: nothing there, or what is there is not what was written.
    """
    check_folder(folder)
    return load_component(str(folder), "", DetailVAE, dtype, f"DetailVAE {folder}")
