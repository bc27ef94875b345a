"""An upgrade file and the DetailVAE that belongs to it: how it is named, found and checked."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from davae.backbones.families import family_of
from davae.backbones.head_options import in_precision
from davae.errors import ModelError
from davae.files.atomic import save_tensors
from davae.files.reading import read_object
from davae.pretrained.open import HUB_ID, fetch_file
from davae.pretrained.placement import own_device
from davae.pretrained.stored import check_component
from davae.publish.assemble import UPGRADE_FILE, VAE_FOLDER, read_details, read_metadata, read_upgrade
from davae.publish.changes import Changes, as_changes, is_changed
from davae.vae.blocks import downsample
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import encode_mode
from davae.zoo import resolve_upgrade

logger = logging.getLogger(__name__)

NEAR = 0.05  # relative distance of two base latents that still are the same autoencoder's, in other precisions


@dataclass(frozen=True)
class UpgradeFile:
    """An upgrade file with its DetailVAE's folder."""

    file: Path
    vae: Path
    metadata: dict[str, str]

    @property
    def class_name(self) -> str:
        return self.metadata["class"]

    @property
    def channels(self) -> tuple[int, int]:
        """C and C+D."""
        details = read_details(self.file, self.metadata)
        return details.base_channels, details.channels


def vae_id(folder: Path) -> str:
    """Return the SHA-256 of a saved autoencoder: its config, and every tensor by name."""
    config = read_object(folder / "config.json")
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True).encode())
    where = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            where |= dict.fromkeys(stream.keys(), file)  # no mapping
    for name, file in sorted(where.items()):
        with safe_open(file, framework="pt") as stream:
            tensor = stream.get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_upgrade(
    source: Path, folder: Path, dtype: torch.dtype, base: torch.nn.Module | None = None, rank: int | None = None
) -> Changes | None:
    """Write a run's upgrade file in `dtype` next to the DetailVAE of a folder, with its id.

    Returns how changes are stored, None where the weights are stored as they are.

    Args:
        base: the pretrained transformer, where changes are stored in place of weights.
        rank: of these changes; None stores them in 8 bits.
    """
    metadata, tensors = read_upgrade(source)
    own = {"vae": json.dumps({"id": vae_id(folder / VAE_FOLDER), "path": VAE_FOLDER})}
    changes, stored = None, {}
    if base is not None:
        family = family_of(base)
        stored, changes = as_changes(tensors, dict(base.named_parameters()), rank, family, dtype, own_device())
        own[changes.key] = json.dumps(changes.note)
        tensors = {name: t for name, t in tensors.items() if not is_changed(name, tuple(t.shape), rank, family)}
        how = "changes in 8 bits keep" if rank is None else f"rank {rank} keeps"
        logger.info(
            "%s %.*f %% of the squared change of the weights", how, 3 if rank is None else 1, 100 * changes.kept
        )
    save_tensors(folder / UPGRADE_FILE, {**in_precision(tensors, dtype), **stored}, {**metadata, **own})
    return changes


def find_upgrade(name: str, vae: Path | None = None) -> UpgradeFile:
    """Find an upgrade by file, folder, hub id or embedded name, with its DetailVAE.

    Args:
        vae: the DetailVAE's folder, where it is not at the place in the file.

    Raises:
        ModelError: nothing there, or a DetailVAE other than the one that the file was trained with.
    """
    place = resolve_upgrade(name)
    if place.is_dir():
        place = place / UPGRADE_FILE
    elif not place.is_file() and HUB_ID.fullmatch(name):
        place = _download(name)
    metadata = read_metadata(place)
    details = read_details(place, metadata)
    folder = vae or place.parent / details.vae_folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"{place} needs its DetailVAE, and {folder} has none; give its folder with --vae")
    check_component(folder, f"DetailVAE {folder}")
    if details.vae_id is not None and (found := vae_id(folder)) != details.vae_id:
        raise ModelError(
            f"{place} was trained with DetailVAE {str(details.vae_id)[:12]}, {folder} is {found[:12]}; give the right one "
            "with --vae"
        )
    return UpgradeFile(place, folder, metadata)


def upgrade_vae(folder: Path) -> Path:
    """Return the folder of the DetailVAE of an upgrade's folder.

    Raises:
        ModelError: no upgrade file.
    """
    file = folder / UPGRADE_FILE
    return folder / read_details(file, read_metadata(file)).vae_folder


def _download(name: str) -> Path:
    """`upgrade.safetensors` and `vae/` of a hub id."""
    place = fetch_file(name, "", UPGRADE_FILE)
    fetch_file(name, VAE_FOLDER, "config.json")
    fetch_file(name, VAE_FOLDER, "diffusion_pytorch_model.safetensors")
    return place


@torch.no_grad()
def check_base_autoencoder(vae: DetailVAE, base: torch.nn.Module, name: str) -> None:
    """Check that a DetailVAE's frozen encoder is a base autoencoder's, by latents of noise.

    Args:
        vae, base: in float32.
        name: of the base, for messages.

    Raises:
        ModelError: another class, or other latents.
    """
    expected = vae.config["base_class"]
    if type(base).__name__ != expected:
        raise ModelError(
            f"base {name} has a {type(base).__name__}, the upgrade's DetailVAE was made from an {expected}"
        )
    side = 4 * vae.spatial_factor
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mine = vae.encode_raw(images).z
    theirs = encode_mode(base, downsample(images, vae.layout.scale, vae.config["downsample"]))
    if mine.shape != theirs.shape or float((mine - theirs).norm() / theirs.norm()) > NEAR:
        raise ModelError(
            f"base {name} has another autoencoder than the upgrade's DetailVAE was made from: it encodes differently"
        )
