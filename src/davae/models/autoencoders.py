"""Open a diffusers autoencoder, or a DetailVAE, from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch

from davae.models.autoencoder_families import autoencoder_family
from davae.models.families import model_class
from davae.models.pipeline import MissingPart, ModelError, read_config


def autoencoder_config(name: str) -> tuple[str, dict[str, Any]]:
    """Where in a folder or hub id an autoencoder lies ("" or "vae"), and its config.

    Raises:
        ModelError: nothing there.
    """
    try:
        return "", read_config(name, "")
    except MissingPart:
        return "vae", read_config(name, "vae")


def load_autoencoder(name: str) -> Any:
    """A DetailVAE or a supported diffusers autoencoder, float32, in eval mode.

    Args:
        name: an autoencoder's folder, a folder with one in `vae/`, or a hub id of either.

    Raises:
        ModelError: nothing there, or a class that is not supported.
    """
    part, config = autoencoder_config(name)
    kind = str(config.get("_class_name"))
    if kind != "DetailVAE":
        try:
            autoencoder_family(kind)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from error
    options = {"subfolder": part} if part else {}
    return model_class(kind).from_pretrained(name, torch_dtype=torch.float32, **options).eval()
