"""`davae recipes`: the shipped recipes."""

from __future__ import annotations

from davae.cli.options import Json, write_json
from davae.recipes import shipped_recipes


def recipes(json: Json = None) -> None:
    """List the shipped recipes. Example: `davae recipes --json recipes.json`"""
    from rich.console import Console

    shown = {
        name: next((line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")), "")
        for name, text in shipped_recipes().items()
    }
    write_json(json, shown)
    width = max(map(len, shown))
    for name, line in shown.items():
        Console().print(f"{name:<{width}}  {line}", markup=False, highlight=False, soft_wrap=True)
