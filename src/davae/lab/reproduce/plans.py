"""What jobs need that is not here, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, Job, PlannedJob, UpgradeJob
from davae.plan.dry_run import base_gpu_days, gpu_days, stage_flops
from davae.pretrained.autoencoders import autoencoder_config
from davae.pretrained.open import HUB_ID, read_shapes
from davae.recipes import BaseRecipe, Recipe
from davae.tasks.base_model import base_shapes
from davae.vae.codec import latent_shape
from davae.zoo import MODELS, SHIPPED, resolve
from davae.zoo.presets import find_preset, presets

HUB_FILES = ("model_index.json", "config.json")


def missing_parts(wanted: Sequence[Job]) -> list[str]:
    """What the jobs need and this machine lacks, each a sentence."""
    needed = sorted({path for job in wanted for path in needs(job)})
    lacking = [f"{path} is not here" for path in needed if not present(path)]
    return lacking if torch.cuda.is_available() else [*lacking, "there is no GPU"]


def needs(job: Job) -> Iterator[str]:
    """Folders, files and hub ids that a job reads."""
    if isinstance(job, PlannedJob):
        yield from job.needs
    if isinstance(job, DrawnJob):
        yield from (job.pipeline, job.generation["data"])
    if isinstance(job, (UpgradeJob, EnlargedJob, BaseJob)):
        yield from (job.recipe.data.source, job.measures["generation"]["data"])
    if isinstance(job, (UpgradeJob, EnlargedJob)) and job.recipe.base.model is not None:
        yield job.recipe.base.model
    if isinstance(job, BaseJob):
        if job.detail is not None:
            yield from needs(job.detail)
        elif isinstance(job.recipe.autoencoder, str):
            yield job.recipe.autoencoder
        if job.recipe.init is not None:
            yield job.recipe.init


def present(name: str) -> bool:
    """Whether a path exists, or a model is embedded or in the hub's cache."""
    if name in MODELS or name in SHIPPED or name.startswith("openmoji") or Path(name).exists():
        return True
    cached = (try_to_load_from_cache(name, file) for file in HUB_FILES) if HUB_ID.fullmatch(name) else ()
    return any(isinstance(path, str) for path in cached)


def cost(job: Job) -> str:
    """H100-days of a job's training, where configs tell them; those of a preset stand in for a model that is not here."""
    if isinstance(job, UpgradeJob):
        return upgrade_cost(job.recipe)
    if isinstance(job, BaseJob):
        return base_cost(job.recipe, job.like, None if job.detail is None else job.detail.recipe)
    if isinstance(job, EnlargedJob) and job.super_resolution is not None:
        return "a small network to train"
    recipe = job.recipe if isinstance(job, PlannedJob) else None
    if isinstance(job, PlannedJob) and isinstance(recipe, BaseRecipe):
        return base_cost(recipe, job.like)
    return upgrade_cost(recipe) if isinstance(recipe, Recipe) else "no training"


def upgrade_cost(recipe: Recipe) -> str:
    """H100-days of an upgrade."""
    sizes = recipe.resolution, recipe.scale, recipe.detail_channels, recipe.stage1_pixels
    preset = stand_in(recipe)
    if preset is not None:
        return f"about {gpu_days(recipe, preset_flops(preset, *sizes)):.2g} H100-days{by_preset(preset)}"
    if absent(recipe.base.model):
        return f"cost unknown until {recipe.base.model} is there"
    return f"about {gpu_days(recipe, stage_flops(base_shapes(recipe), *sizes)):.2g} H100-days"


@cache
def preset_flops(preset: str, *sizes: int) -> tuple[float, float]:
    """`stage_flops` of a preset: counted once for all rows of a table."""
    return stage_flops(read_shapes(preset), *sizes)


def base_cost(recipe: BaseRecipe, like: str | None, detail: Recipe | None = None) -> str:
    """H100-days of a base recipe; the DetailVAE of `detail`, which other runs share, comes on top."""
    if not isinstance(recipe.autoencoder, str):
        return f"about {base_gpu_days(recipe):.2g} H100-days"
    if detail is None:
        found, wanted, extra = autoencoder_latents(recipe.autoencoder, like), recipe.autoencoder, ""
    else:
        found, wanted, extra = upgrade_latents(detail), detail.base.model, " and its DetailVAE"
    if found is None:
        return f"cost unknown until {wanted} is there"
    latents, note = found
    return f"about {base_gpu_days(recipe, latents):.2g} H100-days{extra}{note}"


Latents = tuple[tuple[int, int], str]  # (pixels per position, channels), and whose configs tell them


def autoencoder_latents(name: str, like: str | None) -> Latents | None:
    """Latents of an autoencoder, by itself or by the preset that is like it; None where neither tells."""
    if Path(name).is_dir():
        config, note = autoencoder_config(name)[1], ""
    elif like is not None:
        config, note = presets()[like].parts["vae"], by_preset(like)
    else:
        return None
    return latent_shape(config, str(config["_class_name"])), note


def upgrade_latents(recipe: Recipe) -> Latents | None:
    """Latents of an upgrade's DetailVAE; None where nothing tells."""
    preset = stand_in(recipe)
    if preset is None and absent(recipe.base.model):
        return None
    shapes = base_shapes(recipe) if preset is None else read_shapes(preset)
    latents = shapes.vae_factor * recipe.scale, shapes.channels + recipe.detail_channels
    return latents, "" if preset is None else by_preset(preset)


def absent(model: str | None) -> bool:
    """Whether an upgrade's base model is to come from elsewhere."""
    return model is not None and not Path(resolve(model)).is_dir()


def stand_in(recipe: Recipe) -> str | None:
    """The preset of an upgrade's base model, or of its folder's name, where the model is not here."""
    model = recipe.base.model
    if model is None or not absent(model):
        return None
    preset = find_preset(model) or find_preset(Path(model).name)
    return None if preset is None else preset.name


def by_preset(name: str) -> str:
    return f" (configs of the preset {name})"
