"""Recipes: YAML in, frozen pydantic models out.

Names are imported on first use, so that `davae --help` builds no pydantic models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from davae.errors import RecipeError

if TYPE_CHECKING:
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

_HOMES = {
    "BaseRecipe": "base",
    "Recipe": "upgrade",
    "SuperResolutionRecipe": "super_resolution",
    **dict.fromkeys(
        ("check_command_source", "check_commands", "forbid_commands", "permit_commands", "typed_commands"), "commands"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'davae.recipes' has no attribute '{name}'")
    return getattr(importlib.import_module(f"davae.recipes.{_HOMES.get(name, 'loading')}"), name)
