"""The steps of an upgrade: their order, which are due, and what each leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from davae.runs import upgrade
from davae.runs.upgrade import Step, Upgrade


def run_of(folder: Path, first: Path, done: set[str], base: bool, polish: bool = False) -> Any:
    """Return a run without models, whose steps note their names."""
    run = Upgrade.__new__(Upgrade)
    run.recipe = SimpleNamespace(  # type: ignore[assignment]
        base=SimpleNamespace(train=object() if base else None),
        stage1=SimpleNamespace(polish=object() if polish else None),
        run=SimpleNamespace(stop_signals=()),
    )
    run.out, run.first, run.origin = folder, first, first
    run.folder = SimpleNamespace(done=done.__contains__, mark_done=done.add)  # type: ignore[assignment]
    return run


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    steps = tuple(
        Step(step.name, lambda run, name=step.name: names.append(name), step.leaves)  # type: ignore[misc]
        for step in upgrade.UPGRADE_STEPS
    )
    monkeypatch.setattr(upgrade, "UPGRADE_STEPS", steps)
    monkeypatch.setattr(upgrade, "is_whole", lambda folder: True)
    return names


def test_every_step_is_done_once_in_order(noted: list[str], tmp_path: Path):
    done: set[str] = set()
    run = run_of(tmp_path, tmp_path, done, base=True, polish=True)
    assert run.train_vae() == tmp_path / "vae"
    assert noted == ["base", "stage1"]
    assert run.cache_latents() == tmp_path / "cache"
    assert run.run() == tmp_path / "pipeline"
    steps = ["base", "stage1", "cache", "stage1.polish", "stage2"]
    assert noted == steps == [step.name for step in upgrade.UPGRADE_STEPS]
    assert done == set(noted)
    run.run()
    assert len(noted) == 5


def test_a_base_and_a_polish_that_the_recipe_has_not_are_not_due(noted: list[str], tmp_path: Path):
    run_of(tmp_path, tmp_path, set(), base=False).run()
    assert noted == ["stage1", "cache", "stage2"]


def test_a_cache_that_is_gone_is_due_again(noted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, tmp_path, {"stage1", "cache", "stage2"}, base=False)
    assert not run.due("cache")
    monkeypatch.setattr(upgrade, "is_whole", lambda folder: False)
    assert run.due("cache")


def test_steps_of_another_run_are_not_due(noted: list[str], tmp_path: Path):
    run = run_of(tmp_path / "mine", tmp_path / "first", set(), base=True)
    assert run.train_dit() == tmp_path / "mine" / "pipeline"
    assert noted == ["stage2"]
    assert run.train_vae() == tmp_path / "first" / "vae"
    own = run_of(tmp_path / "own", tmp_path / "first", set(), base=True, polish=True)
    assert own.run("stage1.polish") == tmp_path / "own" / "polished", "a polish and stage 2 are each run's own"
    assert noted == ["stage2", "stage1.polish"]
