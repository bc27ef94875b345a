"""Growth is measured one thing at a time, on the stages as they are trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_upgrade_recipe
from warm import start

from davae.errors import RecipeError, RunError
from davae.lab.bench import growth
from davae.lab.bench.growth import bench_growth, stage_figures
from davae.recipes import Recipe, validate


def tiny(base: Path, pictures: Path) -> Recipe:
    recipe = validate(tiny_upgrade_recipe(base, pictures), "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def test_the_first_third_warms_up_and_late_steps_stand_beside_early_ones():
    seconds = [9.0, 9.0, 9.0, 2.0, 2.0, 4.0, 3.0, 3.0, 1.0]
    records = [
        {"stage": "stage1", "step": i, "seconds_step": s, "images_per_second": 6 / s, "memory_gib": i / 10}
        for i, s in enumerate(seconds)
    ]
    other = {"stage": "stage2", "step": 0, "seconds_step": 100.0, "images_per_second": 0.0, "memory_gib": 9.0}
    figures = stage_figures([*records, other], "stage1")
    assert figures == {"images_per_second": 2.5, "peak_gib": 0.8, "late_over_early": 1.5}


def test_one_thing_changes_at_a_time(tiny_base: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch):
    launched = []

    def here(stage: str, recipe: Path, out: Path, processes: int) -> None:
        launched.append((stage, processes))
        growth.run_stage(stage, recipe, out)

    monkeypatch.setattr(growth, "launch", here)
    recipe = tiny(tiny_base, picture_folder)
    size = recipe.base.resolution
    figures = bench_growth(recipe, sizes=[size], batches=[2, 4], processes=[1, 2], steps=3)
    assert [(row["resolution"], row["batch"], row["processes"]) for row in figures["rows"]] == [
        (recipe.resolution, 2, 1),
        (recipe.resolution, 4, 1),
        (recipe.resolution, 2, 2),
    ]
    assert launched == [(stage, count) for count in (1, 1, 2) for stage in ("stage1", "cache", "stage2")]
    for row in figures["rows"]:
        assert row["cache"]["items"] > 0
        assert min(row["stage1"]["images_per_second"], row["stage2"]["images_per_second"]) > 0


@pytest.mark.slow
def test_two_processes_share_a_batch(tiny_base: Path, picture_folder: Path):
    recipe = tiny(tiny_base, picture_folder)
    figures = bench_growth(recipe, sizes=[recipe.base.resolution], batches=[4], processes=[2], steps=3)
    assert figures["rows"][0]["processes"] == 2


def test_too_few_steps_and_a_failed_stage_are_told(
    tiny_base: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(words: list[str], env: dict[str, str], **options: bool) -> SimpleNamespace:
        process = start(words[1:], tmp_path / "log", **env)
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stderr=(tmp_path / "log").read_text())

    monkeypatch.setattr(growth.subprocess, "run", run)
    recipe = tiny(tiny_base, picture_folder)
    with pytest.raises(RecipeError, match="--steps 2"):
        bench_growth(recipe, sizes=[16], batches=[2], processes=[1], steps=2)
    with pytest.raises(RunError, match=r"stage1 with 1 process\(es\) failed: .*base.resolution: 17 is not"):
        bench_growth(recipe, sizes=[17], batches=[2], processes=[1], steps=3)
