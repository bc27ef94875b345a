"""Files that shipped recipes name, and that are not in the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from davae.errors import RecipeError
from davae.recipes.loading import read_recipe, shipped_recipes

OURS = ("../shared/", "benchmarks/")  # next to the repository, and in it
MADE = ("runs/", "models/")  # by `davae train-base` and `davae convert`
YOURS = ("./", "data/")  # images that the user has


def places(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every value that names such a file, there or not."""
    if isinstance(values, BaseModel):
        values = values.model_dump(mode="json")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from places(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith((*OURS, *MADE, *YOURS)):
            yield f"{prefix}{key}", value


def needs_repository(values: Any) -> bool:
    """Return whether a recipe names data of the project's own benchmarks."""
    return any(text.startswith(OURS) for _, text in places(values))


def check_places(recipe: BaseModel, name: str) -> None:
    """Refuse a shipped recipe whose own files are not here, before any work.

    Values that the user gave are left to whatever reads them.

    Args:
        recipe: the resolved recipe.
        name: what the user gave; a file's places are its writer's, and are not checked.

    Raises:
        RecipeError: names the setting, the file and what to give instead.
    """
    if name not in shipped_recipes():
        return
    shipped = dict(places(read_recipe(name)))
    for path, text in sorted(places(recipe), key=lambda place: place[0].count(".")):
        if shipped.get(path) == text and not Path(text).exists():
            raise RecipeError(f"recipe {name}, {path}: {text} is not here; {_remedy(path, text)}")


def _remedy(path: str, text: str) -> str:
    data = path.endswith("data.source")
    own = "--data IMAGES" if path == "data.source" else f"--set {path}={'IMAGES' if data else 'FILE'}"
    if text.startswith(OURS):
        return f"it belongs to the project's own benchmarks and is not in the package; give your own with {own}"
    if text.startswith(YOURS):
        return f"give your images with {own}"
    parts = Path(text).parts
    if parts[-1] == "pipeline":
        return f"run `davae train-base {parts[-2]}` first, or give another with --set {path}=FOLDER"
    return f"make it with `davae convert` (docs/class-conditional.md), or give another with --set {path}=FOLDER"
