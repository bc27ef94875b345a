"""Recipes: YAML in, frozen pydantic models out."""

from davae.recipes.loading import (
    RecipeError,
    differences,
    dump_recipe,
    load_recipe,
    shipped_recipes,
    validate,
)
from davae.recipes.schema import BaseRecipe, Recipe

__all__ = [
    "BaseRecipe",
    "Recipe",
    "RecipeError",
    "differences",
    "dump_recipe",
    "load_recipe",
    "shipped_recipes",
    "validate",
]
