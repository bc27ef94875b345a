"""The steps of an upgrade: their order, which are due, and what each leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from davae.errors import RecipeError, RunError
from davae.recipes import load_recipe
from davae.runs import upgrade
from davae.runs.checks import taken_from
from davae.runs.upgrade import Step, Upgrade
from davae.tasks.base_model import BaseModel, with_known_base
from davae.train.locking import base_home, keep_origin, kept_origin


def run_of(folder: Path, first: Path, done: set[str], base: bool, polish: bool = False) -> Any:
    """Return a run without models, whose steps note their names."""
    run = Upgrade.__new__(Upgrade)
    run.recipe = SimpleNamespace(  # type: ignore[assignment]
        base=SimpleNamespace(train=object() if base else None),
        stage1=SimpleNamespace(polish=object() if polish else None),
        stage2=SimpleNamespace(lora=None),
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
    for name in ("mine", "own"):
        (tmp_path / name).mkdir()
    run = run_of(tmp_path / "mine", tmp_path / "first", set(), base=True)
    assert run.train_dit() == tmp_path / "mine" / "pipeline"
    assert noted == ["stage2"]
    assert run.train_vae() == tmp_path / "first" / "vae"
    own = run_of(tmp_path / "own", tmp_path / "first", set(), base=True, polish=True)
    assert own.run("stage1.polish") == tmp_path / "own" / "polished", "a polish and stage 2 are each run's own"
    assert noted == ["stage2", "stage1.polish"]


def test_a_run_goes_on_with_what_an_earlier_stage1_option_gave_it(tmp_path: Path):
    run, other, third = (tmp_path / name for name in ("run", "other", "third"))
    for folder in (run / "checkpoints", run / "vae", other / "base", third / "base"):
        folder.mkdir(parents=True)
    keep_origin(run, other)
    assert taken_from(run, True) is taken_from(run, False) is None, "nothing has begun"
    assert base_home(run) == run
    (run / "checkpoints" / "stage1-00000001").mkdir()
    assert taken_from(run, False) is None, "its stage 1 is its own"
    (run / "checkpoints" / "stage1.done").write_text("1")
    assert taken_from(run, False) is None, "its autoencoder was taken along"
    assert (taken_from(run, True), base_home(run)) == (other, other)
    recipe: Any = load_recipe("imagenette128-gpu")
    assert BaseModel.of(with_known_base(recipe)[0], run).name == str(other / "base" / "pipeline")
    (run / ".stage1").unlink()
    message = "run: its base is not there; where another run has it, give that to `davae train-dit --stage1`$"
    with pytest.raises(RunError, match=message):
        taken_from(run, True)


def test_the_run_whose_stage_1_serves_changes_until_stage_2_began(tmp_path: Path):
    run, other, third = (tmp_path / name for name in ("run", "other", "third"))
    for folder in (
        run / "checkpoints",
        run / "vae",
        other / "base",
        third / "base",
    ):  # vae/: with statistics of its own
        folder.mkdir(parents=True)
    (run / "checkpoints" / "stage1.polish-inputs.json").touch()
    for origin in (other, third, other):
        keep_origin(run, origin)
        assert taken_from(run, False) == base_home(run) == origin
    (run / "checkpoints" / "stage2-inputs.json").touch()
    keep_origin(run, third)
    assert taken_from(run, False) == third, "no checkpoint is trained on the other's"
    (run / "checkpoints" / "stage2-00000001").mkdir()
    keep_origin(run, other)
    assert taken_from(run, False) == third
    (third / "base").rmdir()
    third.rmdir()
    assert base_home(run) == run
    message = f"run: its stage 1 is not there, it was taken from {third}; give that run's place to `davae train-dit"
    with pytest.raises(RunError, match=message):
        taken_from(run, False)
    keep_origin(run, other)
    assert taken_from(run, False) == other, "it was moved there"


def test_no_run_is_its_own_origin(tmp_path: Path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        (folder / "checkpoints" / "stage2-00000001").mkdir(parents=True)
    keep_origin(run, run / ".." / "run")
    assert not (run / ".stage1").exists()
    (run / ".stage1").write_text(str(run))  # the folder took its origin's name
    assert (kept_origin(run), base_home(run)) == (None, run)
    keep_origin(run, other)
    keep_origin(other, run)
    assert base_home(run) in {run, other}


def test_an_origin_is_noted_when_the_steps_begin(noted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(run: Upgrade) -> None:
        raise RecipeError("base.dtype")

    mine, first = tmp_path / "mine", tmp_path / "first"
    mine.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Upgrade, "check_precision", refuse)
        with pytest.raises(RecipeError):
            run_of(mine, first, set(), base=False).run()
    assert not (mine / ".stage1").exists()
    run_of(mine, first, set(), base=False).run()
    assert (mine / ".stage1").read_text() == str(first)
