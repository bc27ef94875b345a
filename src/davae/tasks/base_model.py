"""What an upgrade needs to know of its base model, read once from configs."""

from __future__ import annotations

from typing import Any

import torch

from davae.backbones.families import family_by_class
from davae.pretrained.autoencoders import autoencoder_config
from davae.pretrained.open import BaseShapes, read_shapes
from davae.recipes import Recipe
from davae.recipes.base import BaseRecipe, ClassArchitecture
from davae.tasks.autoencoder import build_autoencoder
from davae.tasks.class_conditional import build_class_transformer
from davae.tasks.text_to_image import build_transformer
from davae.vae.codec import latent_shape
from davae.zoo import resolve


def base_shapes(recipe: Recipe) -> BaseShapes:
    """Shapes of the recipe's base model, trained already or not."""
    if recipe.base.train is not None:
        return planned_shapes(recipe.base.train)
    assert recipe.base.model is not None
    return read_shapes(resolve(recipe.base.model))


def bucket_step(recipe: Recipe, shapes: BaseShapes) -> int | None:
    """Return the pixels that a token spans, None for models of square images alone."""
    if family_by_class(shapes.transformer_class).condition == "class":
        return None
    return shapes.vae_factor * recipe.scale * shapes.patch_size


def planned_shapes(recipe: BaseRecipe) -> BaseShapes:
    """Shapes of the model that a recipe would train, without a weight."""
    if isinstance(recipe.autoencoder, str):
        config = autoencoder_config(recipe.autoencoder)[1]
        vae_class = str(config["_class_name"])
    else:
        with torch.device("meta"):
            own = build_autoencoder(recipe)
        config, vae_class = dict(own.config), type(own).__name__
    factor, channels = latent_shape(config, vae_class)
    with torch.device("meta"):
        transformer = new_transformer(recipe, channels, recipe.resolution // factor)
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
    """The recipe's transformer for latents (channels, side, side), random weights, whatever it starts from."""
    if isinstance(recipe.architecture, ClassArchitecture):
        return build_class_transformer(recipe.model_copy(update={"init": None}), channels, side)
    return build_transformer(recipe.architecture, channels, side)
