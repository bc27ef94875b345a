"""The paper's tables as data: which recipe each row changes, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt

from davae.errors import RecipeError
from davae.recipes.loading import suggestion
from davae.recipes.sections import Section
from davae.recipes.values import read_yaml

ScaleName = Literal["micro", "gpu", "paper"]


class Generation(Section):
    """How samples are drawn and compared with real pictures."""

    data: str
    num: PositiveInt
    steps: PositiveInt
    guidance: NonNegativeFloat
    features: Literal["lite0", "inception"]
    batch_size: PositiveInt = 32  # drawn at a time; the pictures do not hang on it


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


RowKind = Literal["upgrade", "enlarged", "base", "drawn", "planned"]


class Row(Section):
    """One row. What is given tells its kind; `set` changes the recipe that is trained.

    - `upgrade`, where nothing is given: the scale's recipe.
    - `enlarged`, by `upscale`: the base model's pictures, enlarged; `network` is a trained super-resolution network.
    - `base`, by `recipe`: a base recipe, for `davae train-base`.
    - `drawn`, by `pipeline`: a model that is there, measured without training.
    - `planned`, by `commands`: printed, not run.
    """

    name: str
    set: dict[str, Any] = Field(default={})
    upscale: Literal["bilinear", "bicubic", "lanczos", "network"] | None = None  # of a drawn row too
    recipe: str | None = None  # of a planned row: what its commands train, for its cost
    detail_vae: dict[str, Any] | None = None  # base rows: `set` of the upgrade whose DetailVAE is the autoencoder
    like: str | None = (
        None  # a preset with as large latents: tells a base recipe's cost where its autoencoder is not here
    )
    pipeline: str | None = None
    resolution: PositiveInt | None = None  # drawn rows: pixels that are drawn; the model's own where not given
    commands: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # planned rows: files, folders and hub ids that the commands read
    notes: tuple[str, ...] = ()  # planned rows: what the commands do not give

    @property
    def kind(self) -> RowKind:
        if self.commands:
            return "planned"
        if self.pipeline is not None:
            return "drawn"
        if self.upscale is not None:
            return "enlarged"
        return "upgrade" if self.recipe is None else "base"


class Table(Section):
    """`claim` is what the paper finds. `set` changes every upgrade; `generation` is instead of the scale's.

    `rows` are those of every scale, `micro` those of the small ones (micro and gpu), `paper` its own.
    """

    title: str
    claim: str
    set: dict[str, Any] = Field(default={})
    generation: Generation | None = None
    throughput: bool = False  # whether images a second are measured, all rows in turns
    compare_at: PositiveInt | None = None  # pixels of drawn rows' pictures when they are measured
    needs: tuple[str, ...] = ()  # of all planned rows
    notes: tuple[str, ...] = ()  # on all planned rows
    rows: tuple[Row, ...] = ()
    micro: tuple[Row, ...] = ()
    paper: tuple[Row, ...] = ()

    def rows_at(self, scale: ScaleName) -> tuple[Row, ...]:
        """Every row of the table at a scale."""
        return (*self.rows, *(self.paper if scale == "paper" else self.micro))


def _read(name: str) -> Any:
    return read_yaml((files("davae.lab.reproduce.tables") / f"{name}.yaml").read_bytes(), f"table {name}")


def table_names() -> list[str]:
    """Names of the shipped tables."""
    entries = (e.name for e in files("davae.lab.reproduce.tables").iterdir())
    return sorted(e.removesuffix(".yaml") for e in entries if e.endswith(".yaml") and e != "scales.yaml")


def load_table(name: str) -> Table:
    """Raises RecipeError for an unknown name."""
    known = table_names()
    if name not in known:
        raise RecipeError(f"unknown table '{name}'{suggestion(name, known)}; there are {', '.join(known)}")
    return Table.model_validate(_read(name))


def load_scale(name: ScaleName) -> Scale:
    return Scale.model_validate(_read("scales")[name])


def upgrade_overrides(scale: Scale, *changes: Mapping[str, Any], seed: int = 0) -> list[str]:
    """The `a.b=c` of one upgrade at a scale; what stands later wins."""
    values = {key: value for part in (scale.set, *changes) for key, value in part.items()}
    return as_overrides(values | ({"stage2.seed": seed} if seed else {}))


def base_overrides(changes: Mapping[str, Any], seed: int = 0) -> list[str]:
    """The `a.b=c` of one training of a base recipe. Seeds share the autoencoder."""
    return as_overrides({**changes} | ({"dit.seed": seed} if seed else {}))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """`a.b=c` for each value, as the command line takes it."""
    return [f"{path}={'null' if value is None else value}" for path, value in values.items()]


def overrides_for(
    kind: type[BaseModel], kinds: Iterable[type[BaseModel]], overrides: Iterable[str], changes: Mapping[str, Any]
) -> list[str]:
    """Those of a user's overrides that are for one recipe, where a table has several.

    An override goes to every recipe that has its section and does not replace it by a plain value; one whose section none of
    `kinds` has goes to all, whose loading then says what is wrong with it.

    Args:
        kind: of the recipe.
        kinds: of all recipes of the table.
        changes: what the row itself changes.
    """

    found = []
    for override in overrides:
        path = override.partition("=")[0].strip()
        section = path.partition(".")[0]
        replaced = path != section and section in changes and not isinstance(changes[section], Mapping)
        unknown = not any(section in other.model_fields for other in kinds)
        if unknown or (section in kind.model_fields and not replaced):
            found.append(override)
    return found
