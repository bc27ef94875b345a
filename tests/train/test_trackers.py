"""Trackers: the steps of every stage arrive, in runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import tiny_recipe
from test_loop import Items, OneWeight

from davae.recipes.sections import Run
from davae.train.loop import Trainer
from davae.train.monitor import open_trackers
from davae.train.run_folder import RunFolder


class FakeRun:
    """Keeps, as wandb does, what is logged at its own step or later."""

    def __init__(self) -> None:
        self.step, self.kept, self.axes = 0, [], {}  # type: ignore[var-annotated]

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if step is None or step >= self.step:
            self.kept.append(values)
            self.step = self.step + 1 if step is None else step


class FakeTracker:
    """Passes values on as accelerate's trackers do."""

    def __init__(self, name: str):
        self.name, self.tracker = name, FakeRun()

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.tracker.log({**values, "passed": step}, step=step, **more)


def test_the_steps_of_every_stage_arrive(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    wandb, board = FakeTracker("wandb"), FakeTracker("tensorboard")
    accelerator.trackers = [wandb, board]
    folder = RunFolder(tmp_path, tiny_recipe())
    for name in ("stage1", "stage1.polish", "stage2"):
        task = OneWeight(2, set(), "adamw")
        task.name, task.dataset = name, Items(task.dataset)
        Trainer(task, Run(log_every=1, trackers=("wandb",)), folder, accelerator).fit()  # type: ignore[arg-type]
    names = ("stage1", "stage1-polish", "stage2")  # wandb takes a dot for a level of nested values
    steps = [{key: value for key, value in values.items() if key.endswith("/step")} for values in wandb.tracker.kept]
    assert steps == [{f"{name}/step": step} for name in names for step in (1, 2)]
    for name in names:
        assert wandb.tracker.axes[f"{name}/*"] == f"{name}/step"
    assert "stage1-polish/loss" in wandb.tracker.kept[2]
    assert {values["passed"] for values in wandb.tracker.kept} == {None}
    first = board.tracker.kept[0]
    assert first["passed"] == 1
    assert "stage1/loss" in first
    assert "stage1/step" not in first


def test_run_folders_of_equal_names_are_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []

    class Engine:
        trackers = ()

        def init_trackers(self, project: str, config: dict, init_kwargs: dict) -> None:
            options.append(init_kwargs["wandb"])

    monkeypatch.chdir(tmp_path)
    for folder in (Path("a/run"), Path("b/run"), tmp_path / "a" / "run"):
        open_trackers(Engine(), Run(trackers=("wandb",)), folder, "stage1", {})  # type: ignore[arg-type]
    first, second, again = (entry["id"] for entry in options)
    assert first != second
    assert first == again
    assert all(entry["name"] == "run" for entry in options)
