"""The paper's tables as data: which recipe each row changes, and how."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt

from davae.recipes.loading import AnyRecipe, RecipeError, load_recipe, suggestion
from davae.recipes.schema import Section

ScaleName = Literal["micro", "paper"]


class Generation(Section):
    """How samples are drawn and compared with real pictures."""

    data: str
    num: PositiveInt
    steps: PositiveInt
    guidance: NonNegativeFloat
    features: Literal["lite0", "inception"]


class Reconstructed(Section):
    """Which pictures are encoded and decoded."""

    data: str
    num: PositiveInt


class Scale(Section):
    """What all tables share: `set` changes the recipe of every row."""

    recipe: str
    set: dict[str, Any]
    seeds: PositiveInt  # of stage 2
    generation: Generation
    reconstruction: Reconstructed
    super_resolution: str | None  # recipe of the learned baseline of Tab. S2


class Row(Section):
    """`upscale` makes a row of the base model's pictures, enlarged; `network` is a trained super-resolution network."""

    name: str
    upscale: Literal["bilinear", "bicubic", "lanczos", "network"] | None = None
    set: dict[str, Any] = Field(default={})


class Table(Section):
    """`claim` is what the paper finds; `set` changes every row."""

    title: str
    claim: str
    set: dict[str, Any] = Field(default={})
    rows: tuple[Row, ...]


def _read(name: str) -> Any:
    return yaml.safe_load((files("davae.recipes.tables") / f"{name}.yaml").read_text(encoding="utf-8"))


def table_names() -> list[str]:
    """Names of the shipped tables."""
    entries = (e.name for e in files("davae.recipes.tables").iterdir())
    return sorted(e.removesuffix(".yaml") for e in entries if e.endswith(".yaml") and e != "scales.yaml")


def load_table(name: str) -> Table:
    """Raises RecipeError for an unknown name."""
    known = table_names()
    if name not in known:
        raise RecipeError(f"unknown table '{name}'{suggestion(name, known)}; there are {', '.join(known)}")
    return Table.model_validate(_read(name))


def load_scale(name: ScaleName) -> Scale:
    return Scale.model_validate(_read("scales")[name])


def row_overrides(scale: Scale, table: Table, row: Row, seed: int) -> list[str]:
    """The `a.b=c` of one run; what stands later wins."""
    values = {**scale.set, **table.set, **row.set}
    if seed:
        values["stage2.seed"] = seed
    return [f"{path}={'null' if value is None else value}" for path, value in values.items()]


def row_recipe(scale: Scale, table: Table, row: Row, seed: int, more: list[str]) -> AnyRecipe:
    """The resolved recipe of one run; `more` are a user's own overrides."""
    return load_recipe(scale.recipe, [*row_overrides(scale, table, row, seed), *more])
