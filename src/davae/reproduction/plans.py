"""What jobs need that is not here, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from davae.models.autoencoders import autoencoder_config, latent_shape
from davae.models.pipeline import HUB_ID, BaseShapes, read_shapes
from davae.recipes import BaseRecipe, Recipe
from davae.reproduction.job import BaseJob, DrawnJob, EnlargedJob, Job, PlannedJob, UpgradeJob
from davae.train.checks import base_shapes
from davae.train.plan import base_gpu_days, gpu_days
from davae.zoo import MODELS, SHIPPED, resolve
from davae.zoo.presets import find_preset, presets

HUB_FILES = ("model_index.json", "config.json")


def missing_parts(todo: Sequence[Job]) -> list[str]:
    """What the jobs need and this machine lacks, each a sentence."""
    needed = sorted({path for job in todo for path in needs(job)})
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
    shapes, note = known_shapes(recipe)
    if shapes is None:
        return f"cost unknown until {recipe.base.model} is there"
    return f"about {gpu_days(recipe, shapes):.2g} H100-days{note}"


def base_cost(recipe: BaseRecipe, like: str | None, detail: Recipe | None = None) -> str:
    """H100-days of a base recipe; the DetailVAE of `detail`, which other runs share, comes on top."""
    latents, note, extra = None, "", ""
    if detail is not None:
        shapes, note = known_shapes(detail)
        if shapes is None:
            return f"cost unknown until {detail.base.model} is there"
        latents, extra = (
            (shapes.vae_factor * detail.scale, shapes.channels + detail.detail_channels),
            " and its DetailVAE",
        )
    elif isinstance(recipe.autoencoder, str):
        if not Path(recipe.autoencoder).is_dir() and like is None:
            return f"cost unknown until {recipe.autoencoder} is there"
        if Path(recipe.autoencoder).is_dir():
            config = autoencoder_config(recipe.autoencoder)[1]
        else:
            config, note = presets()[str(like)].parts["vae"], by_preset(str(like))
        latents = latent_shape(config, str(config["_class_name"]))
    return f"about {base_gpu_days(recipe, latents):.2g} H100-days{extra}{note}"


def known_shapes(recipe: Recipe) -> tuple[BaseShapes | None, str]:
    """(shapes of an upgrade's base model, whose they are when not its own); None where nothing tells."""
    model = recipe.base.model
    if model is None or Path(resolve(model)).is_dir():
        return base_shapes(recipe), ""
    preset = find_preset(model) or find_preset(Path(model).name)
    return (None, "") if preset is None else (read_shapes(preset.name), by_preset(preset.name))


def by_preset(name: str) -> str:
    return f" (configs of the preset {name})"
