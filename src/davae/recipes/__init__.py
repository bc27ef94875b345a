"""Recipes: YAML in, frozen pydantic models out."""

from davae.recipes.loading import (
    AnyRecipe,
    RecipeError,
    differences,
    dump_recipe,
    load_recipe,
    shipped_recipes,
    validate,
)
from davae.recipes.schema import BaseRecipe, Recipe, SuperResolutionRecipe

__all__ = [
    "AnyRecipe",
    "BaseRecipe",
    "Recipe",
    "RecipeError",
    "SuperResolutionRecipe",
    "differences",
    "dump_recipe",
    "load_recipe",
    "shipped_recipes",
    "validate",
]
