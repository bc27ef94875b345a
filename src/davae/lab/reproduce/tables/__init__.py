"""The paper's tables as data: which recipe each row changes, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt

from davae.errors import RecipeError
from davae.recipes.loading import suggestion
from davae.recipes.sections import Section
from davae.recipes.values import read_yaml

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
ScaleName = Literal["micro", "gpu", "clothing", "paper"]


class Generation(Section):
    """Settings of drawing samples and of comparing them with real images.

    Attributes:
        held_in: share that the trainings hold out; only the rest is compared with. 0 compares with all images.
    """

    data: str
    num: PositiveInt
    steps: PositiveInt
    guidance: NonNegativeFloat
    features: Literal["lite0", "inception"]
    batch_size: PositiveInt = 32  # drawn at a time; no image depends on it
    held_in: Share = 0.0


class Reconstructed(Section):
    """The images that are encoded and decoded.

    Attributes:
        held_out: share that the trainings hold out, of which the images are taken. 0 takes any.
    """

    data: str
    num: PositiveInt
    held_out: Share = 0.0


class Scale(Section):
    """Settings that all tables share at a scale, with changes of every row's recipe."""

    recipe: str
    set: dict[str, Any]
    seeds: PositiveInt  # of stage 2
    generation: Generation
    reconstruction: Reconstructed
    super_resolution: str | None  # recipe of the learned baseline of Tab. S2


RowKind = Literal["upgrade", "enlarged", "detailed", "base", "drawn", "planned"]


class Row(Section):
    """One row, whose kind follows from the fields that are given.

    - `upgrade`, where nothing is given: the scale's recipe.
    - `enlarged`, by `upscale`: images of the base model, enlarged; `network` is a trained super-resolution network.
    - `detailed`, by `upscale: upgrade`: images of the base model, enlarged by its upgrade.
    - `base`, by `recipe`: a base recipe, for `davae train-base`.
    - `drawn`, by `pipeline`: an existing model, measured without training; `upscale` takes the embedded upgrade too.
    - `planned`, by `commands`: printed, not run. docs/paper-scale.md lists inputs and costs.
    """

    name: str
    set: dict[str, Any] = Field(default={})
    upscale: Literal["bilinear", "bicubic", "lanczos", "network", "upgrade", "micro-upgraded"] | None = None
    recipe: str | None = None
    detail_vae: dict[str, Any] | None = None  # base rows: `set` of the upgrade whose DetailVAE is the autoencoder
    pipeline: str | None = None
    resolution: PositiveInt | None = None  # drawn rows: pixels that are drawn; the model's own where not given
    commands: tuple[str, ...] = ()

    @property
    def kind(self) -> RowKind:
        if self.commands:
            return "planned"
        if self.pipeline is not None:
            return "drawn"
        if self.upscale is not None:
            return "detailed" if self.upscale == "upgrade" else "enlarged"
        return "upgrade" if self.recipe is None else "base"


class Table(Section):
    """Rows of a table at every scale.

    Attributes:
        claim: the finding of the paper, or the question of a table of our own.
        set: changes of every upgrade's recipe.
        generation: replaces the scale's.
        throughput: whether images per second are measured, all rows alternating.
        compare_at: pixels at which images of drawn rows are measured.
        rows, micro, paper: rows of every scale, of micro and gpu, of the paper's.
        ours: not a table of the paper.
    """

    title: str
    claim: str
    set: dict[str, Any] = Field(default={})
    generation: Generation | None = None
    throughput: bool = False
    compare_at: PositiveInt | None = None
    rows: tuple[Row, ...] = ()
    micro: tuple[Row, ...] = ()
    paper: tuple[Row, ...] = ()
    ours: bool = False

    def rows_at(self, scale: ScaleName) -> tuple[Row, ...]:
        """Return every row of the table at a scale.

        There are none where the rows of small scales name other models than this scale's.
        """
        if scale == "clothing":
            return () if self.micro else self.rows
        return (*self.rows, *(self.paper if scale == "paper" else self.micro))


def _read(name: str) -> Any:
    return read_yaml((files("davae.lab.reproduce.tables") / f"{name}.yaml").read_bytes(), f"table {name}")


def table_names() -> list[str]:
    """Return the names of the shipped tables."""
    entries = (e.name for e in files("davae.lab.reproduce.tables").iterdir())
    return sorted(e.removesuffix(".yaml") for e in entries if e.endswith(".yaml") and e != "scales.yaml")


def load_table(name: str) -> Table:
    """Return a shipped table.

    Raises:
        RecipeError: unknown name.
    """
    known = table_names()
    if name not in known:
        raise RecipeError(f"unknown table '{name}'{suggestion(name, known, 'there are ' + ', '.join(known))}")
    return Table.model_validate(_read(name))


def load_scale(name: ScaleName) -> Scale:
    return Scale.model_validate(_read("scales")[name])


def upgrade_overrides(scale: Scale, *changes: Mapping[str, Any], seed: int = 0) -> list[str]:
    """Return the `a.b=c` of one upgrade at a scale, in which later changes replace earlier ones.

    Args:
        changes: settings by dotted path, of the table and of the row.
        seed: of stage 2; 0 is the recipe's own.
    """
    values = {key: value for part in (scale.set, *changes) for key, value in part.items()}
    return as_overrides(values | ({"stage2.seed": seed} if seed else {}))


def base_overrides(changes: Mapping[str, Any], seed: int = 0) -> list[str]:
    """Return the `a.b=c` of one training of a base recipe.

    Args:
        changes: settings by dotted path, of the row.
        seed: of the transformer's training; the autoencoder is shared by all seeds.
    """
    return as_overrides({**changes} | ({"dit.seed": seed} if seed else {}))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `a.b=c` for each value, as the command line takes it."""
    return [f"{path}={'null' if value is None else value}" for path, value in values.items()]


def overrides_for(
    kind: type[BaseModel], kinds: Iterable[type[BaseModel]], overrides: Iterable[str], changes: Mapping[str, Any]
) -> list[str]:
    """Return the user's overrides that apply to one recipe of a table.

    An override goes to every recipe that has its section and does not replace it by a plain value. An override whose section
    none of `kinds` has goes to all recipes, and loading one of them then fails with the reason.

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
