"""An upgrade from Python: the same run as the command's, values of the recipe by name, a run opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_upgrade_recipe

import davae
from davae.errors import ModelError, RecipeError, RunError
from davae.recipes import Recipe, load_recipe
from davae.recipes.commands import forbid_commands
from davae.runs.upgrade_run import resolve_recipe

SHORT = {
    "stage1__max_steps": 1,
    "stage2__max_steps": 1,
    "stage2__warmup_steps": 1,
    "report__holdout_pictures": 2,
    "report__timing_repeats": 1,
}


def test_a_run_from_start_to_picture(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    seen: list[davae.Progress] = []
    values = tiny_upgrade_recipe(tiny_base, picture_folder, sampling__steps=1)
    run = davae.upgrade(values, out=tmp_path / "run", progress=seen.append, **SHORT)
    assert {"stage1", "stage2", "report"} <= {step.task for step in seen}
    assert [row["name"] for row in run.report["speed"]][-1] == "upgraded"
    assert {"stage1", "cache", "stage2", "report"} <= run.times.keys()
    image = run.pipeline()("a red square", num_inference_steps=1).images[0]
    assert image.size == (32, 32)
    assert run.pipeline(dtype=torch.bfloat16).dtype == torch.bfloat16

    again = davae.load(run.folder, progress=seen.append)
    assert again.recipe == run.recipe
    count = len(seen)
    assert again.run() == run.folder / "report.html"
    assert again.train_vae() == run.folder / "vae"
    assert len(seen) == count, "finished steps are skipped"
    assert not (run.folder / ".process.json").exists(), "nothing holds the folder between steps"


@pytest.mark.parametrize(
    "changes",
    [{"stage1__max_steps": 3}, {"stage1.max_steps": 3}, {"stage1": {"max_steps": 3}}],
)
def test_values_are_set_by_path_or_section(changes: dict[str, Any]):
    found = resolve_recipe("micro", base="a/model", data=Path("photos"), **changes)
    usual = load_recipe("micro", ["base.model=a/model", "data.source=photos", "stage1.max_steps=3"])
    assert found == usual
    assert resolve_recipe(found, stage1__max_steps=4).stage1.max_steps == 4
    assert resolve_recipe(found.model_dump(), data={"limit": 5}).data.limit == 5
    assert resolve_recipe("micro", data={"limit": 5}).data.source == "openmoji"


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("micro", {"stage1__max_step": 3}, "stage1.max_step: unknown key; did you mean 'max_steps'"),
        ("micro", {"name__x": 3}, "'name' is a value, not a section"),
        ("mcro", {}, "did you mean 'micro'"),
        ("micro-base", {}, "upgrades nothing; use `davae train-base`"),
        ("micro", {"stage1__lr": float("nan")}, "stage1.lr"),
    ],
)
def test_mistakes_are_one_line(recipe: str, changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        davae.UpgradeRun(recipe, **changes)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(ModelError, match="not a run folder"):
        davae.load(tmp_path)
    run = davae.UpgradeRun("micro", out=tmp_path / "new")
    assert isinstance(run.recipe, Recipe)
    assert not run.folder.exists(), "nothing is written before a step"
    with pytest.raises(RunError, match="no report yet"):
        run.report  # noqa: B018


def test_commands_of_a_file_do_not_run(tmp_path: Path):
    forbid_commands()
    values = load_recipe("micro").model_dump(mode="json")
    run = davae.UpgradeRun({**values, "data": {**values["data"], "source": "pipe:touch x"}}, out=tmp_path / "run")
    with pytest.raises(RecipeError, match="davae runs a command only when you type it"):
        run.run()
    assert not run.folder.exists()
    forbid_commands()
