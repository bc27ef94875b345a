"""Open a model by the names that the command line takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin

from davae.backbones.classes import class_number, goes_by_class
from davae.backbones.expand import MARK
from davae.backbones.families import denoiser, family_of
from davae.backbones.lora import widen_lora
from davae.errors import ModelError
from davae.files.atomic import save_tensors
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.lora_files import read_lora
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import FULL, Placement, own_device
from davae.publish.assemble import load_upgraded
from davae.vae.detail_vae import DetailVAE
from davae.zoo import SHIPPED, UPGRADES, resolve


def model_places(name: str) -> list[str]:
    """Return the folders or hub ids that a model is loaded from, by the names that `open_model` takes.

    Raises:
        ModelError: a run that has no pipeline yet.
    """
    folder = Path(name)
    if name in SHIPPED:
        return [resolve(SHIPPED[name]), str(UPGRADES[SHIPPED[name]])]
    if (folder / "pipeline" / "model_index.json").is_file():
        return [str(folder / "pipeline")]
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"run {name} has no pipeline yet; run its `davae upgrade` command to the end")
    return [resolve(name)]


def open_model(
    name: str, placement: Placement = FULL, prepare: Callable[[Any], None] = lambda pipeline: None
) -> tuple[Any, Path]:
    """Return (pipeline on its device, folder for its samples) of a run or pipeline folder, embedded model or hub id.

    Args:
        name: `micro-upgraded` is the embedded model with the upgrade that ships with it.
        placement: where it computes, and how exactly.
        prepare: changes the loaded pipeline before it is placed.
    """
    place, *upgrades = model_places(name)
    pipeline = load_pipeline(place, placement.dtype)
    for upgrade in upgrades:
        pipeline = load_upgraded(pipeline, Path(upgrade))
    own = Path(place) == Path(name) / "pipeline"
    prepare(pipeline)
    return placement.place(pipeline), Path(name) / "samples" if own else Path("samples") / Path(name).name


def check_classes(pipeline: Any, prompts: list[str]) -> None:
    """ModelError when a class-conditional pipeline is asked for a class it does not have."""
    if goes_by_class(pipeline):
        for prompt in prompts:
            try:
                class_number(pipeline, prompt)
            except ValueError as error:
                raise ModelError(str(error)) from error


def open_text_model(name: str, placement: Placement = FULL) -> Any:
    """A text-to-image pipeline by name; ModelError for a class-conditional one."""
    model, _ = open_model(name, placement)
    if goes_by_class(model):
        raise ModelError(f"{name} draws classes, not prompts")
    return model


def open_autoencoder(name: str) -> Any:
    """A DetailVAE or any supported diffusers autoencoder on this process's device, by folder, run or embedded model."""
    place = str(UPGRADES[SHIPPED[name]] / "vae") if name in SHIPPED else resolve(name)
    return load_autoencoder(place).to(own_device())


def open_detail_vae(name: str) -> DetailVAE:
    """A DetailVAE's folder, or a run's; ModelError for any other autoencoder."""
    vae = open_autoencoder(name)
    if not isinstance(vae, DetailVAE):
        raise ModelError(
            f"{name} is a {type(vae).__name__}; this analysis needs a DetailVAE (a run's folder or its vae/)"
        )
    return vae


def add_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA of the base into its pipeline, or into an upgraded one, for which it is widened.

    Raises:
        ModelError: a pipeline that loads no LoRA, a file that is not one or does not fit.
    """
    if not isinstance(pipeline, LoraBaseMixin):
        raise ModelError(f"--lora {file}: a {type(pipeline).__name__} loads no LoRA files; leave it out")
    transformer = denoiser(pipeline)
    part = family_of(transformer).component
    state, settings = read_lora(file, type(pipeline), part, transformer.config)
    metadata = {"format": "pt"} | ({LORA_ADAPTER_METADATA_KEY: json.dumps(settings)} if settings else {})
    try:
        if MARK in transformer.config:
            state = widen_lora(state, transformer)
        with TemporaryDirectory(prefix="davae-lora-") as folder:
            save_tensors(Path(folder) / "lora.safetensors", state, metadata)
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors")  # type: ignore[attr-defined]
    except (ModelError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--lora {file}: it does not fit this {type(transformer).__name__}: {reason}") from error
