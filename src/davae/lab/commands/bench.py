"""`davae bench`: figures of speed, each measured on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from davae.commands.options import Json, write_json
from davae.commands.verbs import Verbs

if TYPE_CHECKING:
    from davae.recipes import Recipe

bench_app = Verbs(no_args_is_help=True, help="Measure speed on this machine.")


def show(target: Json, figures: dict[str, Any]) -> None:
    """Print figures, and write them where `--json` says."""
    from davae.console import console

    write_json(target, figures)
    console.print_json(data=figures)


def upgrade_recipe(name: str, overrides: list[str], data: str | None = None) -> Recipe:
    """The upgrade recipe of that name; RecipeError for any other kind."""
    from davae.errors import RecipeError
    from davae.recipes import Recipe, check_commands, load_recipe
    from davae.recipes.places import check_places

    recipe = load_recipe(name, [*overrides, *([f"data.source={json.dumps(data)}"] if data else [])])
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe '{recipe.name}' is not an upgrade recipe")
    check_commands(recipe)
    check_places(recipe, name)
    return recipe
