"""An upgrade from Python: `davae.upgrade` runs one, `davae.load` opens a finished one.

run = davae.upgrade("micro", out="runs/micro")
image = run.pipeline()("a red rose").images[0]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from davae.errors import RecipeError, RunError
from davae.files.reading import load_json, recipe_file
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import AnyPrecision, Compile, Offload, Placement
from davae.recipes import Recipe, check_commands, load_recipe, permit_commands, read_recipe, set_values, validate
from davae.recipes.commands import commands_in
from davae.recipes.places import check_places
from davae.runs.report import run_with_report
from davae.runs.upgrade import Upgrade
from davae.sample.open import model_places
from davae.train.loop import Observer, Progress
from davae.train.times import read_times


def _ignore(progress: Progress) -> None:
    pass


def upgrade(
    recipe: str | PathLike[str] | Recipe | Mapping[str, Any],
    *,
    out: str | PathLike[str] | None = None,
    base: str | PathLike[str] | Mapping[str, Any] | None = None,
    data: str | PathLike[str] | Mapping[str, Any] | None = None,
    progress: Observer | None = None,
    **overrides: Any,
) -> UpgradeRun:
    """Run every step of an upgrade, as `davae upgrade` does, and return the finished run.

    Finished steps are skipped, so that the same call resumes an interrupted run.

    Args:
        recipe: a shipped recipe's name, a YAML file, a recipe, or its values.
        out: run folder; `runs/NAME` by default.
        base: the pretrained model, a diffusers folder or a hub id (`base.model`); a mapping sets values of the section.
        data: the images (`data.source`); a mapping sets values of the section.
        progress: called with a `davae.Progress` after every step.
        **overrides: values of the recipe by dotted path: `stage1__max_steps=300`, or `stage1={"max_steps": 300}`, or
            `**{"stage1.max_steps": 300}`.

    Returns:
        The run; `run.pipeline()` is the upgraded model.

    Raises:
        RecipeError: a recipe or value that is not possible, by its dotted path.
        ModelError, DataError, RunError: a model, images or a folder that cannot be used.
        Interrupted: stopped by a signal, with everything saved.
    """
    run = UpgradeRun(recipe, out=out, base=base, data=data, progress=progress, **overrides)
    run.run()
    return run


def load(folder: str | PathLike[str], *, progress: Observer | None = None) -> UpgradeRun:
    """Return the run in a folder that `davae upgrade` or `davae.upgrade` wrote, finished or not.

    Args:
        folder: the run folder.
        progress: called after every step, where the run is resumed.

    Raises:
        ModelError: the folder holds no run of an upgrade.
    """
    recipe = recipe_file(
        Path(folder), "open a pipeline by the class in its model_index.json, from davae or diffusers"
    )
    return UpgradeRun(load_recipe(str(recipe)), out=folder, progress=progress)  # type: ignore[arg-type]


class UpgradeRun:
    """One run folder of an upgrade. Each step is skipped where it is done already.

    Args:
        recipe, out, base, data, progress, overrides: as for `davae.upgrade`.

    Attributes:
        recipe: the resolved recipe.
        folder: the run folder.
    """

    def __init__(
        self,
        recipe: str | PathLike[str] | Recipe | Mapping[str, Any],
        *,
        out: str | PathLike[str] | None = None,
        base: str | PathLike[str] | Mapping[str, Any] | None = None,
        data: str | PathLike[str] | Mapping[str, Any] | None = None,
        progress: Observer | None = None,
        **overrides: Any,
    ):
        self.recipe = resolve_recipe(recipe, base=base, data=data, **overrides)
        self._given = recipe
        self.folder = Path("runs") / self.recipe.name if out is None else Path(out)
        self._progress = progress or _ignore

    def __repr__(self) -> str:
        return f"UpgradeRun({self.recipe.name!r}, {str(self.folder)!r})"

    @contextmanager
    def _open(self) -> Iterator[Upgrade]:
        """Hold the run folder while a step works in it."""
        check_commands(self.recipe)
        if isinstance(self._given, str):
            check_places(self.recipe, self._given)
        opened = Upgrade(self.recipe, self.folder, self._progress)
        try:
            yield opened
        finally:
            opened.folder.close()

    # -- steps ---------------------------------------------------------------------------------------------------

    def train_vae(self) -> Path:
        """Run stage 1 and return the folder of the DetailVAE."""
        with self._open() as opened:
            return opened.train_vae()

    def cache_latents(self) -> Path:
        """Run stage 1 and the latent cache, and return the cache's folder."""
        with self._open() as opened:
            opened.check_data()
            opened.train_vae()
            return opened.cache_latents()

    def train_dit(self) -> Path:
        """Run every step up to the exported pipeline and return its folder."""
        with self._open() as opened:
            opened.check_data()
            return opened.run()

    def run(self) -> Path:
        """Run every step up to the report and return its page."""
        with self._open() as opened:
            return run_with_report(opened, self._progress)

    # -- results -------------------------------------------------------------------------------------------------

    @property
    def report(self) -> dict[str, Any]:
        """Figures of the report, as in `report.json`.

        Raises:
            RunError: the report is not written yet.
        """
        file = self.folder / "report.json"
        if not file.is_file():
            raise RunError(f"{self.folder}: there is no report yet; call run(), or `davae upgrade` on this folder")
        try:
            return load_json(file.read_bytes())
        except ValueError as error:
            raise RunError(f"{file}: it is damaged; delete it and call run() again") from error

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each phase took, over all starts."""
        return read_times(self.folder)

    def pipeline(self, *, dtype: AnyPrecision = "float32", offload: Offload = "off", compile: Compile = "off") -> Any:
        """Return the upgraded diffusers pipeline on this process's device, ready to draw.

        Args:
            dtype: precision of the weights, also as a `torch.dtype`.
            offload: `model` or `sequential` keep weights in main memory until the GPU needs them.
            compile: `blocks` or `graphs`, with torch.compile.

        Raises:
            ModelError: the run has no pipeline yet, or it cannot be placed so.
        """
        placement = Placement(dtype, offload, compile)
        return placement.place(load_pipeline(model_places(str(self.folder))[0], placement.dtype))


def resolve_recipe(
    recipe: str | PathLike[str] | Recipe | Mapping[str, Any],
    *,
    base: str | PathLike[str] | Mapping[str, Any] | None = None,
    data: str | PathLike[str] | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Recipe:
    """Return the recipe of an upgrade with values changed, as `upgrade` takes them.

    Raises:
        RecipeError: a value that is not possible, or a recipe of another kind.
    """
    if isinstance(recipe, Recipe):
        values, name = recipe.model_dump(mode="json"), recipe.name
    elif isinstance(recipe, Mapping):
        values, name = json.loads(json.dumps(dict(recipe), default=str)), "given"
    else:
        values, name = read_recipe(str(recipe)), str(recipe)
    changes = dict(overrides)
    for section, key, given in (("base", "model", base), ("data", "source", data)):
        if isinstance(given, Mapping):
            changes[section] = given
        elif given is not None:
            changes[f"{section}.{key}"] = str(given)
    set_values(values, changes)
    permit_commands(commands_in(changes))
    found = validate(values, name)
    if not isinstance(found, Recipe):
        raise RecipeError(f"recipe '{found.name}': it upgrades nothing; use `davae train-base` or `davae train-sr`")
    return found
