"""Open a diffusers autoencoder, or a DetailVAE, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.checksums import check_folder
from davae.models.autoencoder_families import autoencoder_family, base_channels, base_statistics, spatial_factor
from davae.models.detail_vae import DetailVAE
from davae.models.families import model_class
from davae.models.one_frame import encode_mode
from davae.models.pipeline import MissingPart, ModelError, read_config
from davae.models.stored import load_component

DETAIL = DetailVAE.__name__


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


def latent_shape(config: Any, class_name: str) -> tuple[int, int]:
    """(pixels per latent position each way, channels) of an autoencoder, told from its config.

    Raises:
        ValueError: a class that is not supported.
    """
    channels = int(config["latent_channels"]) if class_name == DETAIL else base_channels(config, class_name)
    return spatial_factor(config, class_name), channels


def encode_raw(vae: Any, images: Tensor) -> Tensor:
    """Latents without noise before any normalisation, a DetailVAE's too: (B,3,H,W) in [-1,1] -> (B,c,h,w)."""
    if not isinstance(vae, DetailVAE):
        return encode_mode(vae, images)
    raw = vae.encode_raw(images)
    return vae.layout.join(raw.z, raw.mean)


def raw_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(mean, std) of `encode_raw`, each (1,c,1,1), by which its transformers see the latents; of a DetailVAE over packed
    positions (1,c,2,2)."""
    if isinstance(vae, DetailVAE):
        return vae.mean, vae.std  # type: ignore[return-value]
    mean, std = base_statistics(vae.config)
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
