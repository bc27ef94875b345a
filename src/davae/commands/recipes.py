"""`davae recipes`: the shipped recipes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from davae.commands.options import Json, write_json
from davae.errors import RecipeError

OWN_DATA = " Its data is not in the package: give --data."


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe, to be copied into a file; without a name, list all.")
    ] = None,
    json: Json = None,
) -> None:
    """List the shipped recipes, or print one.

    `davae recipes`

    `davae recipes sd35-medium-1k > mine.yaml` (then `davae upgrade mine.yaml`)
    """
    from davae.recipes import read_recipe, shipped_recipes
    from davae.recipes.loading import suggestion
    from davae.recipes.places import needs_repository

    shipped = shipped_recipes()
    if name is not None:
        if name not in shipped:
            raise RecipeError(f"unknown recipe '{name}'{suggestion(name, shipped, '`davae recipes` lists them')}")
        write_json(json, read_recipe(name))
        sys.stdout.write(shipped[name])
        return
    titles = {
        name: title(text) + (OWN_DATA if needs_repository(read_recipe(name)) else "")
        for name, text in shipped.items()
    }
    write_json(json, titles)
    from rich.console import Console
    from rich.table import Table

    view = Table(box=None, show_header=False, pad_edge=False)
    view.add_column(no_wrap=True)
    view.add_column()
    for row in titles.items():
        view.add_row(*row)
    Console(markup=False, highlight=False).print(view)


def title(text: str) -> str:
    """Return the sentences at the head of a recipe: its first comment, all lines of it."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            if lines:
                break
            continue
        lines.append(line.removeprefix("#").strip())
    return " ".join(" ".join(lines).split())
