"""Jobs of a table: one run for each row and seed."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any, TypeVar

from davae.errors import RecipeError
from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, Job, PlannedJob, UpgradeJob
from davae.lab.reproduce.tables import (
    Row,
    RowKind,
    Scale,
    ScaleName,
    Table,
    base_overrides,
    load_scale,
    load_table,
    overrides_for,
    table_names,
    upgrade_overrides,
)
from davae.lab.super_resolution import WEIGHTS
from davae.recipes import (
    AnyRecipe,
    BaseRecipe,
    Recipe,
    SuperResolutionRecipe,
    check_command_source,
    check_commands,
    load_recipe,
)
from davae.recipes.loading import suggestion

UNREAD = re.compile(r"\s*(sampling|hardware|report(?!\.batch_size))\b")  # overrides that change no figure
ONCE: tuple[RowKind, ...] = ("enlarged", "planned")  # kinds of rows that no seed changes
Kind = TypeVar("Kind", Recipe, BaseRecipe, SuperResolutionRecipe)


def jobs(
    table: str, scale: ScaleName, seeds: int | None, overrides: list[str], rows: list[str] | None = None
) -> list[Job]:
    """Return the runs of a table or of some rows: one seed of all rows before the next seed.

    Args:
        table: name of a shipped table.
        seeds: of every row that depends on a seed; None takes the scale's.
        overrides: `a.b=c`, each for the recipes that have its section.
        rows: names of rows; all by default.

    Raises:
        RecipeError: unknown table or row, a table without rows at this scale, or an override that fits no recipe or
            changes no figure.
    """
    if unread := [override for override in overrides if UNREAD.match(override)]:
        raise RecipeError(
            f"--set {unread[0]}: changes no figure; the scale decides how images are drawn, so leave it out"
        )
    chosen, settings = load_table(table), load_scale(scale)
    at_scale = chosen.rows_at(scale)
    if not at_scale:
        others = ", ".join(name for name in table_names() if load_table(name).rows_at(scale))
        raise RecipeError(f"{table} has no rows at the scale {scale}; these tables have: {others}")
    shown = named_rows(table, at_scale, rows or [])
    factory = JobFactory(table, chosen, settings, overrides, recipe_kinds(shown))
    found = []
    for seed in range(seeds or settings.seeds):
        for row in shown:
            if row.upscale == "network" and settings.super_resolution is None:
                continue
            if seed == 0 or row.kind not in ONCE:
                found.append(factory.job(row, seed))
    unused = [override for override in overrides if override not in factory.used]
    if unused:
        raise RecipeError(f"--set {unused[0]}: no row of {table} trains what it changes")
    return found


def named_rows(table: str, rows: tuple[Row, ...], names: list[str]) -> list[Row]:
    """Return the rows with the given names, or all rows for no names.

    Raises:
        RecipeError: a name that no row has.
    """
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise RecipeError(f"{table} has no row '{name}'{suggestion(name, known)} (its rows: {'; '.join(known)})")
    return [row for row in rows if not names or row.name in names]


def recipe_kinds(rows: list[Row]) -> set[type[AnyRecipe]]:
    """Return the kinds of recipes that rows change."""
    kinds: set[type[AnyRecipe]] = set()
    for row in rows:
        if row.kind in ("upgrade", "enlarged", "detailed") or row.detail_vae is not None:
            kinds.add(Recipe)
        if row.kind == "base":
            kinds.add(BaseRecipe)
    return kinds


@dataclass(frozen=True)
class JobFactory:
    """Jobs of one table at one scale.

    Attributes:
        name: of the table.
        overrides: `a.b=c` of the user.
        kinds: of the recipes that the rows change.
        used: overrides that some recipe took.
    """

    name: str
    table: Table
    scale: Scale
    overrides: list[str]
    kinds: set[type[AnyRecipe]]
    used: set[str] = field(default_factory=set)

    @property
    def measures(self) -> dict[str, Any]:
        generation = self.table.generation or self.scale.generation
        for data in (generation.data, self.scale.reconstruction.data):
            check_command_source(data, "the table's data")
        # without defaults, so that new options change no hash
        return {
            "generation": generation.model_dump(exclude_defaults=True),
            "reconstruction": self.scale.reconstruction.model_dump(exclude_defaults=True),
        }

    def place(self, row: str, seed: int, part: str = "") -> str:
        """Return the folder in which the printed command of a row trains."""
        words = re.findall(r"[a-z0-9.]+", row.lower())
        return f"runs/{self.name}/" + "-".join(
            [*words, *([f"seed{seed}"] if seed else []), *([part] if part else [])]
        )

    def job(self, row: Row, seed: int) -> Job:
        """Return one run of a row."""
        match row.kind:
            case "upgrade":
                return self.upgrade(row.name, row.set, seed, self.place(row.name, seed))
            case "enlarged":
                return self.enlarged(row)
            case "detailed":
                return self.detailed(row, seed)
            case "base":
                return self.base(row, seed)
            case "drawn":
                return self.drawn(row, seed)
            case "planned":
                return PlannedJob(row=row.name, seed=0, command="\n".join(row.commands))

    def load(self, kind: type[Kind], name: str, changes: list[str]) -> Kind:
        """Load a recipe with changes, which must be of a kind."""
        recipe = load_recipe(name, changes)
        if not isinstance(recipe, kind):
            raise RecipeError(f"recipe '{name}' is of kind {recipe.kind}, this row needs another")
        check_commands(recipe)
        return recipe

    def own(self, kind: type[AnyRecipe], changes: dict[str, Any]) -> list[str]:
        """Return the user's overrides for a recipe of a kind to which a row applies changes."""
        found = overrides_for(kind, self.kinds, self.overrides, changes)
        self.used.update(found)
        return found

    def upgrade(self, name: str, changes: dict[str, Any], seed: int, out: str, verb: str = "train-dit") -> UpgradeJob:
        """Return an upgrade by the scale's recipe, changed by the table, a row and the user.

        Its command trains in `out`.
        """
        sets = upgrade_overrides(self.scale, self.table.set, changes, seed=seed)
        sets += self.own(Recipe, {**self.scale.set, **self.table.set, **changes})
        recipe = self.load(Recipe, self.scale.recipe, sets)
        command = shlex.join(["davae", verb, self.scale.recipe, *setting(sets), "--out", out])
        return UpgradeJob(row=name, seed=seed, command=command, recipe=recipe, measures=self.measures)

    def enlarged(self, row: Row) -> EnlargedJob:
        """Return the job of a row of enlarged images, equal for every seed of stage 2."""
        recipe = self.upgrade(row.name, row.set, 0, "").recipe
        network, words = None, []
        method = str(row.upscale)
        if method == "network":
            name = str(self.scale.super_resolution)
            network = self.load(SuperResolutionRecipe, name, [])
            words = ["davae", "train-sr", name, "--out", "runs/sr", "&&"]
            method = f"runs/sr/{WEIGHTS}"
        words += self.generation_words(recipe, method)
        return EnlargedJob(
            row=row.name,
            seed=0,
            command=" ".join(words),
            recipe=recipe,
            measures=self.measures,
            upscale=str(row.upscale),
            usual=self.load(Recipe, self.scale.recipe, upgrade_overrides(self.scale, self.table.set, row.set)),
            super_resolution=network,
        )

    def generation_words(self, recipe: Recipe, upscale: str) -> list[str]:
        """Return the words that measure the base of an upgrade, enlarged."""
        words = generation_words(base_model(recipe), self.measures["generation"], recipe.resolution, upscale)
        return [*words, "--enlarge"] if recipe.data.enlarge else words

    def detailed(self, row: Row, seed: int) -> EnlargedJob:
        """Return the job of a row of base images that their upgrade enlarges."""
        enlarger = self.place(row.name, seed)
        upgrade = self.upgrade(row.name, row.set, seed, enlarger)
        words = [upgrade.command, "&&", *self.generation_words(upgrade.recipe, enlarger)]
        return EnlargedJob(
            row=row.name,
            seed=seed,
            command=" ".join(words),
            recipe=upgrade.recipe,
            measures=self.measures,
            upscale=str(row.upscale),
            usual=upgrade.recipe,
            upgrade=upgrade,
        )

    def base(self, row: Row, seed: int) -> BaseJob:
        """Return the training of a base recipe, on its own autoencoder or on a DetailVAE."""
        changes, words, detail = row.set, [], None
        if row.detail_vae is not None:
            first = self.place(row.name, 0, "stage1")
            detail = self.upgrade(row.name, row.detail_vae, 0, first, "cache-latents")
            words = [detail.command, "&&"]
            changes = {"autoencoder": f"{first}/vae", "vae": None, **changes}
        sets = base_overrides(changes, seed) + self.own(BaseRecipe, changes)
        recipe = self.load(BaseRecipe, str(row.recipe), sets)
        out = ["--out", self.place(row.name, seed)]
        words.append(shlex.join(["davae", "train-base", str(row.recipe), *setting(sets), *out]))
        return BaseJob(
            row=row.name,
            seed=seed,
            command=" ".join(words),
            recipe=recipe,
            measures=self.measures,
            detail=detail,
        )

    def drawn(self, row: Row, seed: int) -> DrawnJob:
        """Return the job of an existing model."""
        upscale, pipeline = row.upscale or "bilinear", str(row.pipeline)
        generation = self.measures["generation"]
        words = generation_words(pipeline, generation, self.table.compare_at, row.upscale)
        words += [] if row.resolution is None else ["--resolution", str(row.resolution)]
        words += ["--seed", str(seed)] if seed else []
        return DrawnJob(
            row=row.name,
            seed=seed,
            command=" ".join(words),
            pipeline=pipeline,
            resolution=row.resolution,
            compare_at=self.table.compare_at,
            upscale=upscale,
            generation=generation,
        )


def base_model(recipe: Recipe) -> str:
    """Return the base model of an upgrade, which tables do not train.

    Raises:
        RecipeError: the recipe trains its base.
    """
    if recipe.base.model is None:
        raise RecipeError("tables need a base model that is trained already: --set base.model=FOLDER")
    return recipe.base.model


def setting(overrides: list[str]) -> list[str]:
    """Return the overrides with `--set` before each."""
    return [word for override in overrides for word in ("--set", override)]


def generation_words(pipeline: str, chosen: dict[str, Any], compare_at: int | None, upscale: str | None) -> list[str]:
    """Return the words of `davae evaluate generation` with the settings of a table.

    Args:
        pipeline: a folder, an embedded model or a hub id.
        chosen: the table's settings of generation.
        compare_at: pixels at which images are measured; None is the size that is drawn.
        upscale: how images of another size are brought to `compare_at`.
    """
    words = ["davae", "evaluate", "generation", "--pipeline", pipeline, "--data", chosen["data"]]
    words += [] if compare_at is None else ["--compare-at", str(compare_at)]
    words += [] if upscale is None else ["--upscale", upscale]
    words += ["--held-in", str(chosen["held_in"])] if "held_in" in chosen else []
    words += ["--num", str(chosen["num"]), "--steps", str(chosen["steps"])]
    return [*words, "--guidance", str(chosen["guidance"]), "--features", chosen["features"]]
