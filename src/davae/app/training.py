"""Trainings that the page starts: `davae upgrade` as a process of its own, read through its run folder."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.app.uploads import MAX_TRAINING_STEPS, store_pictures
from davae.files import atomic_text
from davae.recipes import Recipe, RecipeError, dump_recipe, load_recipe, shipped_recipes
from davae.train.state import RunError, read_metrics

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
GONE = "this training has no folder; start it first"


@dataclass(frozen=True)
class State:
    """What a run folder tells of its training."""

    running: bool
    finished: bool
    line: str


@dataclass
class Trainings:
    """The trainings under one folder, of which one runs at a time."""

    root: Path
    name: str = ""  # of the training that was started last
    process: subprocess.Popen | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def folder(self, name: str) -> Path:
        """A training's run folder; RunError when the name could lead elsewhere."""
        if not NAME.fullmatch(name):
            raise RunError(f"'{name}' is no name for a training; use small letters, digits and '-', 40 at most")
        return self.root / name

    def names(self) -> list[str]:
        """Trainings that have a folder, by name."""
        return sorted(
            path.parent.name for path in self.root.glob("*/recipe.yaml") if NAME.fullmatch(path.parent.name)
        )

    def running(self, name: str) -> bool:
        return name == self.name and self.process is not None and self.process.poll() is None

    def start(
        self,
        name: str,
        recipe: str,
        *,
        data: str | None = None,
        uploads: list[Path] | None = None,
        overrides: list[str] | None = None,
    ) -> None:
        """Start `davae upgrade RECIPE` in the folder of this name. Uploaded pictures are copied there first.

        Raises:
            RecipeError: unknown recipe, wrong value, or more steps than the page takes.
            DataError: an upload that cannot be used.
            RunError: another training runs, or the name is taken by one of other values.
        """
        folder = self.folder(name)
        if uploads:
            data = str(folder / "pictures")
        resolved = load_recipe(recipe, [*(overrides or []), *([f"data.source={json.dumps(data)}"] if data else [])])
        if not isinstance(resolved, Recipe):
            raise RecipeError(f"recipe '{recipe}' upgrades nothing; use one of {', '.join(upgrade_recipes())}")
        for stage in ("stage1", "stage2"):
            steps = getattr(resolved, stage).max_steps
            if steps > MAX_TRAINING_STEPS:
                raise RecipeError(f"{stage}.max_steps: {steps}; the page trains up to {MAX_TRAINING_STEPS} steps")
        with self._lock:
            self._refuse_second()
            if (folder / "recipe.yaml").is_file():
                raise RunError(f"there is a training '{name}' already; resume it, or choose another name")
            if uploads:
                store_pictures(uploads, folder / "pictures")
            folder.mkdir(parents=True, exist_ok=True)
            atomic_text(folder / "recipe.yaml", dump_recipe(resolved))
            self._launch(name)

    def resume(self, name: str) -> None:
        """Go on with the recipe in the training's folder; RunError when there is none, or another one runs."""
        with self._lock:
            self._refuse_second()
            if not (self.folder(name) / "recipe.yaml").is_file():
                raise RunError(GONE)
            self._launch(name)

    def _refuse_second(self) -> None:
        if self.running(self.name):
            raise RunError(f"training '{self.name}' runs; pause it first, or wait: one runs at a time")

    def _launch(self, name: str) -> None:
        folder = self.folder(name)
        with (folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "davae", "upgrade", str(folder / "recipe.yaml"), "--out", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the server reaches the training as a pause, through `close`
            )
        self.name = name

    def pause(self, name: str) -> None:
        """Ask a running training to save and stop; it does after the step it is in. RunError when it does not run."""
        if not self.running(name):
            raise RunError(f"training '{name}' does not run")
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def close(self, timeout: float = 60.0) -> None:
        """Pause what runs and wait for its checkpoint: the server is about to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout)

    def state(self, name: str) -> State:
        """Whether a training runs or is done, and a line that says where it stands."""
        folder = self.folder(name)
        if not (folder / "recipe.yaml").is_file():
            return State(False, False, GONE)
        finished = self.report(name) is not None
        if self.running(name):
            return State(True, finished, f"running: {self._position(folder)}")
        if finished:
            return State(False, True, "finished: the report is written")
        code = self.process.poll() if name == self.name and self.process is not None else None
        if code in (None, 130, -signal.SIGTERM):
            return State(False, False, f"paused: {self._position(folder)}")
        return State(False, False, f"stopped: {last_line(folder / 'log.txt')}")

    def _position(self, folder: Path) -> str:
        """Where a run stands, from what it has written so far."""
        done = {path.stem for path in (folder / "checkpoints").glob("*.done")}
        records = read_metrics(folder / "metrics.jsonl")
        recipe = load_recipe(str(folder / "recipe.yaml"))
        assert isinstance(recipe, Recipe)
        if "stage2" in done:
            return "writing the report"
        if "stage1" in done and not any(record["stage"] == "stage2" for record in records):
            return "detail VAE trained; caching latents"
        if not records:
            return "no step logged yet"
        last = records[-1]
        steps = recipe.stage1.max_steps if last["stage"] == "stage1" else recipe.stage2.max_steps
        stage = {"stage1": "stage 1, detail VAE", "stage2": "stage 2, transformer"}.get(last["stage"], last["stage"])
        return f"{stage}: step {last['step']} of {steps}, {last['images_per_second']:.0f} images/s"

    def report(self, name: str) -> Path | None:
        """The report's page of a training, once it is written."""
        page = self.folder(name) / "report.html"
        return page if page.is_file() else None

    def newest_checkpoint(self, name: str) -> str:
        """Folder name of the newest checkpoint, stage 2 before stage 1; empty before the first."""
        found = (self.folder(name) / "checkpoints").glob("stage[12]-[0-9]*")
        return max((path.name for path in found), default="")

    def curves(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Losses of both stages so far: stage -> rows of step, value and curve."""
        shown = {
            "stage1": {"l1": "L1", "align": "alignment"},
            "stage2": {"loss_base": "base", "loss_detail": "detail"},
        }
        rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in shown}
        for record in read_metrics(self.folder(name) / "metrics.jsonl"):
            for key, title in shown.get(record["stage"], {}).items():
                if key in record:
                    rows[record["stage"]].append({"step": record["step"], "value": record[key], "curve": title})
        return rows


def upgrade_recipes() -> list[str]:
    """Shipped recipes that `davae upgrade` takes."""
    return [name for name in shipped_recipes() if isinstance(load_recipe(name), Recipe)]


def last_line(log: Path) -> str:
    """What a process said last, cut to a line."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"
