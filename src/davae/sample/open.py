"""Models by the names that the command line takes, and settings of drawn images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from davae.publish.assemble import POLISHED, load_upgraded
from davae.vae.detail_vae import DetailVAE
from davae.zoo import SHIPPED, UPGRADES, resolve, split_revision


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of drawn images, which every verb that draws takes.

    Attributes:
        steps: sampling steps.
        guidance: guidance scale; 1 or less turns guidance off.
        seed: seed of the noise.
        resolution: pixels of a square's side, or (height, width); None is the pipeline's own size.
        batch_size: images that are drawn at a time.
        placement: precision of the weights, and where and how the pipeline computes.
    """

    steps: int = 30
    guidance: float = 2.5
    seed: int = 0
    resolution: int | tuple[int, int] | None = None
    batch_size: int = 16
    placement: Placement = FULL

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that images depend on, without the model's own size and float32."""
        own = {"steps": self.steps, "guidance": self.guidance, "seed": self.seed, **self.placement.changes}
        return own if self.resolution is None else {**own, "resolution": self.resolution}

    @property
    def figures(self) -> dict[str, float]:
        """Return the settings that figures record, under their keys."""
        return {"steps": self.steps, "guidance_scale": self.guidance, "seed": self.seed}

    @property
    def side(self) -> int | None:
        """Return the side of a square in pixels, None for the pipeline's own size."""
        assert not isinstance(self.resolution, tuple)
        return self.resolution


DEFAULT_OPTIONS = SamplingOptions()


def model_places(name: str) -> list[str]:
    """Return the folders or hub ids that a model is loaded from.

    Args:
        name: the model, by the names that `open_model` takes.

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
    """Return a pipeline on its device, and the folder for its samples.

    Args:
        name: `micro-upgraded` is the embedded model with the upgrade that ships with it.
        placement: where it computes, and how exactly.
        prepare: changes the loaded pipeline before it is placed.
    """
    place, *upgrades = model_places(name)
    pipeline = load_pipeline(place, placement.dtype)
    for upgrade in upgrades:
        pipeline = load_upgraded(pipeline, Path(upgrade))
    prepare(pipeline)
    return placement.place(pipeline), samples_folder(name, place)


def samples_folder(name: str, place: str) -> Path:
    """Return the folder for a model's images: a run's own, else `samples/NAME`."""
    if Path(place) == Path(name) / "pipeline":
        return Path(name) / "samples"
    model, revision = split_revision(name)
    title = Path(os.path.abspath(model)).name  # of `.` and `..` too
    return Path("samples") / (title if revision is None else f"{title}@{revision.replace('/', '-')}")


def check_class_prompts(pipeline: Any, prompts: list[str]) -> None:
    """Refuse a prompt that is not a class of a class-conditional pipeline.

    Args:
        pipeline: any pipeline; prompts of other ones are not checked.
        prompts: texts, or classes by name or number.

    Raises:
        ModelError: names the class, and the classes that the model has.
    """
    if goes_by_class(pipeline):
        for prompt in prompts:
            try:
                class_number(pipeline, prompt)
            except ValueError as error:
                raise ModelError(str(error)) from error


def open_text_model(name: str, placement: Placement = FULL) -> Any:
    """Return a text-to-image pipeline by the names that `open_model` takes.

    Args:
        name: the model.
        placement: where it computes, and how exactly.

    Raises:
        ModelError: a class-conditional model.
    """
    model, _ = open_model(name, placement)
    if goes_by_class(model):
        raise ModelError(f"{name} draws classes, not prompts")
    return model


def open_autoencoder(name: str) -> Any:
    """Return an autoencoder on this process's device, by folder, run or embedded model.

    A run with `stage1.polish` has two: its folder gives the polished one, its `vae/` that of stage 1.
    """
    place = str(UPGRADES[SHIPPED[name]] / "vae") if name in SHIPPED else resolve(name)
    if (polished := Path(place) / POLISHED / "config.json").is_file():
        place = str(polished.parent)
    return load_autoencoder(place).to(own_device())


def open_detail_vae(name: str) -> DetailVAE:
    """Return the DetailVAE of a folder, a run or an embedded model.

    Raises:
        ModelError: another autoencoder.
    """
    vae = open_autoencoder(name)
    if not isinstance(vae, DetailVAE):
        raise ModelError(
            f"{name} is a {type(vae).__name__}; this analysis needs a DetailVAE (a run's folder or its vae/)"
        )
    return vae


def add_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA of the base into its pipeline, or widened into an upgraded one.

    Args:
        pipeline: the pipeline, changed in place.
        file: the LoRA, .safetensors.

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
