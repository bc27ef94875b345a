"""Recipes: YAML in, frozen pydantic models out."""

from davae.errors import RecipeError
from davae.recipes.base import BaseRecipe
from davae.recipes.commands import (
    check_command_source,
    check_commands,
    forbid_commands,
    permit_commands,
    typed_commands,
)
from davae.recipes.loading import (
    AnyRecipe,
    differences,
    dump_recipe,
    load_data,
    load_recipe,
    read_recipe,
    set_values,
    shipped_recipes,
    validate,
)
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.recipes.upgrade import Recipe

__all__ = [
    "AnyRecipe", "BaseRecipe", "Recipe", "RecipeError", "SuperResolutionRecipe", "check_command_source",
    "check_commands", "differences", "dump_recipe", "forbid_commands", "load_data", "load_recipe",
    "permit_commands", "read_recipe", "set_values", "shipped_recipes", "typed_commands", "validate",
]  # fmt: skip
