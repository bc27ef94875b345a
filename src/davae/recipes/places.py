"""Files that shipped recipes expect next to the repository, outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from davae.errors import RecipeError

SHARED, RUNS, MODELS = "../shared/", "runs/", "models/"


def places(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every value that names such a file, there or not."""
    if isinstance(values, BaseModel):
        values = values.model_dump(mode="json")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from places(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith((SHARED, RUNS, MODELS)):
            yield f"{prefix}{key}", value


def needs_repository(values: Any) -> bool:
    """Return whether a recipe names data of the project's own benchmarks."""
    return any(text.startswith(SHARED) for _, text in places(values))


def check_places(recipe: BaseModel, name: str) -> None:
    """Refuse a shipped recipe whose files are not here, before any work.

    Raises:
        RecipeError: names the setting, the file and what to give instead.
    """
    for path, text in sorted(places(recipe), key=lambda place: place[0].count(".")):
        if not Path(text).exists():
            raise RecipeError(f"recipe {name}, {path}: {text} is not here; {_remedy(path, text)}")


def _remedy(path: str, text: str) -> str:
    if text.startswith(SHARED):
        own = "--data IMAGES" if path == "data.source" else f"--set {path}=FILE"
        return f"it belongs to the project's own benchmarks and is not in the package; give your own with {own}"
    parts = Path(text).parts
    if parts[-1] == "pipeline":
        return f"run `davae train-base {parts[-2]}` first, or give another with --set {path}=FOLDER"
    return f"make it with `davae convert` (docs/class-conditional.md), or give another with --set {path}=FOLDER"
