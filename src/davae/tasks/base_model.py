"""The pretrained model of a run: its configs, read once, and its parts, loaded on request."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from davae.backbones.families import family_by_class
from davae.backbones.family import Family
from davae.errors import ModelError, RecipeError
from davae.pretrained.autoencoders import autoencoder_config
from davae.pretrained.distilled import Distilled, distilled
from davae.pretrained.open import Configs, load_part, load_pipeline, load_scheduler
from davae.pretrained.shapes import BaseShapes, longest_side, read_shapes
from davae.pretrained.text_encoders import TextEncoder, load_text_encoders, reads_silent_t5, text_encoders
from davae.recipes import Recipe, load_recipe, shipped_recipes
from davae.recipes.base import BaseRecipe, ClassArchitecture
from davae.recipes.sections import FlowOptim
from davae.tasks.autoencoder import build_autoencoder
from davae.tasks.class_conditional import build_class_transformer
from davae.tasks.noising import Objective, choose_objective, flow_matching
from davae.tasks.text_to_image import build_transformer
from davae.train.locking import base_home
from davae.vae.codec import latent_shape
from davae.zoo import resolve
from davae.zoo.presets import presets


class BaseModel:
    """A pretrained diffusers pipeline, or one that a recipe is going to train.

    Args:
        name: folder, hub id or preset from which its weights are loaded.
        title: what messages call it; `name` unless given.
        configs: folder, hub id or preset from which its configs are read; `name` unless given.
        planned: the recipe that trains it, while there is nothing to read yet.
        to_train: refuse a family that can only be expanded.
    """

    def __init__(
        self,
        name: str,
        *,
        title: str | None = None,
        configs: str | None = None,
        planned: BaseRecipe | None = None,
        to_train: bool = True,
    ):
        self.name, self.title, self.planned, self.to_train = name, title or name, planned, to_train
        self.configs = Configs(configs or name)

    @classmethod
    def of(cls, recipe: Recipe, folder: Path | None = None, configs: str | None = None) -> BaseModel:
        """Return the base model of an upgrade's recipe.

        Args:
            recipe: the upgrade's.
            folder: run folder in which, or for which (`--stage1`), the recipe trains its base model.
            configs: folder, hub id or preset from which configs are read; the model itself unless given.
        """
        base = recipe.base
        if base.train is not None:
            place = base.name if folder is None else str(base_home(folder) / "base" / "pipeline")
            return cls(place, title=base.name, planned=base.train)
        assert base.model is not None
        return cls(resolve(base.model), title=base.model, configs=configs)

    @cached_property
    def shapes(self) -> BaseShapes:
        """Classes, channels, factors and configs.

        Raises:
            ModelError: a model that cannot be upgraded.
        """
        if self.planned is not None:
            return planned_shapes(self.planned)
        return read_shapes(self.configs, to_train=self.to_train)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None of a model that reads text."""
        key = self.family.classes_key
        return None if key is None else int(self.shapes.transformer_config[key])

    @property
    def only_side(self) -> int | None:
        """Side in pixels of the one square that the pipeline draws, None where it draws others."""
        config, factor = self.shapes.transformer_config, self.shapes.vae_factor
        if self.family.condition == "class":  # LightningDiT's own configs have input_size alone
            return (config.get("sample_size") or config["input_size"]) * factor
        return None if self.family.fixed_side is None else self.family.fixed_side * factor

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline's class."""
        return self.shapes.pipeline_class

    @cached_property
    def family(self) -> Family:
        """The family of the transformer: its layers, and its call."""
        return family_by_class(self.shapes.transformer_class)

    @cached_property
    def distilled(self) -> Distilled | None:
        """Kind of distillation, None for a model without any or one that a recipe trains."""
        return None if self.planned is not None else distilled(self.configs, self.title)

    @cached_property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, None where it has none."""
        return load_scheduler(self.configs)

    def objective(self, settings: FlowOptim) -> Objective:
        """Return the objective that the scheduler implies, flow matching where a recipe trains.

        Args:
            settings: the stage that trains it, with the timesteps of flow matching.

        Raises:
            ModelError: an objective that stage 2 cannot train, or a config that contradicts the scheduler.
        """
        flow = flow_matching(settings)
        if self.planned is not None:
            return flow
        objective = choose_objective(self.scheduler, self.family, self.title, flow)
        stated = self.shapes.transformer_config.get("prediction_type")  # a LightningDiT has its own
        if stated is not None and (stated == "epsilon") != (objective.prediction == "epsilon"):
            raise ModelError(
                f"model {self.title}: its transformer predicts {stated}, its scheduler belongs to {objective.prediction}; "
                "put the scheduler that the model was trained with into its folder"
            )
        return objective

    @cached_property
    def text_encoders(self) -> list[TextEncoder]:
        """Text encoders from configs alone, none of a class-conditional or planned model."""
        return [] if self.planned is not None else text_encoders(self.configs, self.shapes.transformer_config)

    @cached_property
    def silent_t5(self) -> bool:
        """True for a Stable Diffusion 3 that gets only zeros from its third text encoder."""
        return reads_silent_t5(self.configs)

    def bucket_step(self, scale: int) -> int | None:
        """Return the pixels of a token at `scale` times the resolution, None for square models."""
        if self.family.condition == "class":
            return None
        return self.shapes.vae_factor * scale * self.shapes.patch_size

    def cannot_draw(self, pixels: int) -> str:
        """Return why the base cannot draw an image of a size, '' where it can."""
        if self.family.fixed_side is not None and self.only_side != pixels:
            return f"{self.title} draws {self.only_side} pixels and no other size"
        longest = longest_side(self.shapes.transformer_config)
        side = pixels // (self.shapes.vae_factor * self.shapes.patch_size)
        if longest is None or side <= longest:
            return ""
        return f"{pixels} pixels are {side} tokens in a row, and {self.title} knows positions up to {longest}"

    def load_vae(self) -> Any:
        """Load the autoencoder, in float32."""
        return load_part(self.name, "vae", self.shapes.vae_class)

    def load_transformer(self, dtype: torch.dtype) -> Any:
        """Load the transformer or U-Net in a precision."""
        return load_part(self.name, self.family.component, self.shapes.transformer_class, dtype)

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        """Load the whole pipeline in a precision, into main memory."""
        return load_pipeline(self.name, dtype)

    def load_text_encoders(self, dtype: torch.dtype) -> Any:
        """Load the pipeline without its transformer, to embed prompts, in a precision."""
        return load_text_encoders(self.name, self.family.component, self.shapes.transformer_config, dtype)


def with_known_base(recipe: Recipe) -> tuple[Recipe, str]:
    """Return a recipe whose base can be read from configs, and a note on where it is read.

    A folder that does not exist yet is read from its origin: `runs/NAME/pipeline` from the shipped base recipe NAME,
    `models/NAME` from the preset NAME.
    """
    model = recipe.base.model
    if model is None or Path(model).exists() or len(parts := Path(model).parts) < 2:
        return recipe, ""
    shipped = load_recipe(parts[-2]) if parts[-1] == "pipeline" and parts[-2] in shipped_recipes() else None
    if isinstance(shipped, BaseRecipe):
        change, origin = {"model": None, "train": shipped}, f"the recipe {shipped.name}"
    elif parts[0] == "models" and parts[-1] in presets():
        change, origin = {"model": parts[-1]}, f"the preset {parts[-1]}"
    else:
        return recipe, ""
    base = recipe.base.model_copy(update=change)
    return recipe.model_copy(update={"base": base}), f"{model} is not here: read from {origin}"


def planned_shapes(recipe: BaseRecipe) -> BaseShapes:
    """Return the shapes of the model that a recipe would train, without a weight.

    Raises:
        ModelError: an autoencoder that cannot be read.
        RecipeError: sizes of which no transformer can be built.
    """
    if isinstance(recipe.autoencoder, str):
        config = autoencoder_config(resolve(recipe.autoencoder))[1]
        vae_class = str(config["_class_name"])
    else:
        with torch.device("meta"):
            own = build_autoencoder(recipe)
        config, vae_class = dict(own.config), type(own).__name__
    factor, channels = latent_shape(config, vae_class)
    try:
        with torch.device("meta"):
            transformer = new_transformer(recipe, channels, recipe.resolution // factor)
    except ValueError as error:
        raise RecipeError(f"architecture: {error}") from error
    kind = type(transformer).__name__
    return BaseShapes(
        pipeline_class=family_by_class(kind).pipeline,
        transformer_class=kind,
        vae_class=vae_class,
        channels=channels,
        vae_factor=factor,
        patch_size=recipe.architecture.patch_size,
        transformer_config=dict(transformer.config),
        vae_config=config,
    )


def new_transformer(recipe: BaseRecipe, channels: int, side: int) -> Any:
    """Return the recipe's transformer with random weights, of latents (channels, side, side)."""
    if isinstance(recipe.architecture, ClassArchitecture):
        return build_class_transformer(recipe.model_copy(update={"init": None}), channels, side)
    return build_transformer(recipe.architecture, channels, side)
