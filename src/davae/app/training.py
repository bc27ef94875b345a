"""Trainings that the page starts: `davae upgrade` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.app import slot
from davae.app.forms import excerpt, without_folders
from davae.app.limits import is_below
from davae.app.uploads import MAX_TRAINING_STEPS, named, shown_name, store_images
from davae.dataset.opened import SUMMARY
from davae.errors import RecipeError, RunError
from davae.files.atomic import atomic_text
from davae.files.reading import read_object
from davae.recipes import Recipe, dump_recipe, load_recipe, shipped_recipes
from davae.recipes.places import check_places
from davae.recipes.stages import POLISH
from davae.train.locking import running_process
from davae.train.run_folder import read_metrics

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
GONE = "this training has no folder; start it first"
SAVED = "run the same command"  # in the last line of a training that saved and stopped
SPARE = 2**30  # bytes of the disk that are free before a training starts
MOST = 200  # trainings below one root
OUTPUT = "output.txt"  # what a training prints; its messages are in the run's own log.txt
LOG_END = 64 * 2**10  # bytes of a log whose last line is shown


@dataclass(frozen=True)
class State:
    """State of a training, read from its run folder."""

    running: bool
    finished: bool
    line: str


@dataclass
class Trainings:
    """The trainings under one folder, of which one runs at a time, whichever page started it."""

    root: Path
    process: subprocess.Popen | None = None  # the training that this page started last
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: dict[str, int] = field(
        default_factory=dict
    )  # name -> exit status, of the trainings that this page started

    def folder(self, name: str) -> Path:
        """Return a training's run folder.

        Raises:
            RunError: the name could lead elsewhere.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RunError(
                f"{excerpt(name)} is not a name for a training; use small letters, digits and '-', 40 at most"
            )
        return self.root / name

    def names(self) -> list[str]:
        """Return the names of trainings that have a folder, sorted."""
        return sorted(
            path.parent.name for path in self.root.glob("*/recipe.yaml") if NAME.fullmatch(path.parent.name)
        )

    def current(self) -> str:
        """Return the name of the training that runs, '' where none does.

        A training outlives a page that was killed: it is found by the lock that it holds on a file of the root.
        """
        self._reap()
        held = slot.holder(self.root)
        if held is not None:
            return held.name
        return next((name for name in self.names() if running_process(self.root / name) is not None), "")

    def running(self, name: str) -> bool:
        """Return whether a training runs, also one that another page or a command started."""
        folder = self.folder(name)
        self._reap()
        held = slot.holder(self.root)
        return (held is not None and held.name == name) or running_process(folder) is not None

    def _reap(self) -> None:
        """Keep the exit status of the training that this page started, once it has ended."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self._ended[Path(self.process.args[-1]).name] = code  # type: ignore[index]
            self.process = None

    def start(
        self,
        name: str,
        recipe: str,
        *,
        data: str | None = None,
        uploads: list[Path] | None = None,
        overrides: list[str] | None = None,
    ) -> None:
        """Start `davae upgrade RECIPE` in the folder of a name, after its uploads are copied there.

        Args:
            name: of the training.
            recipe: name of a recipe.
            data: source of images; by default the recipe's.
            uploads: images and captions that replace it.
            overrides: of recipe fields.

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
        check_places(resolved, recipe)
        for stage, settings in resolved.trainings.items():
            steps = settings.max_steps
            if steps > MAX_TRAINING_STEPS:
                raise RecipeError(f"{stage}.max_steps: {steps}; the page trains up to {MAX_TRAINING_STEPS} steps")
        with self._lock:
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_second(sum(path.stat().st_size for path in uploads or ()))
            if len(self.names()) >= MOST:
                raise RunError(f"{MOST} trainings lie here already; remove old ones")
            if (folder / "recipe.yaml").is_file():
                raise RunError(f"there is a training '{name}' already; resume it, or choose another name")
            if uploads:
                store_images(uploads, folder / "pictures")
            folder.mkdir(parents=True, exist_ok=True)
            atomic_text(folder / "recipe.yaml", dump_recipe(resolved))
            self._launch(name)

    def resume(self, name: str) -> None:
        """Go on with the recipe in the training's folder.

        Raises:
            RunError: there is none, or another training runs.
        """
        with self._lock:
            if not (self.folder(name) / "recipe.yaml").is_file():
                raise RunError(GONE)
            self._refuse_second()
            self._launch(name)

    def _refuse_second(self, copied: int = 0) -> None:
        """Refuse a training while another one runs, or on a disk without room for its uploads."""
        name = self.current()
        if name:
            raise RunError(f"training '{name}' runs; pause it first, or wait: one runs at a time")
        free = shutil.disk_usage(self.root).free
        if free < SPARE + copied:
            needed = (SPARE + copied) >> 20
            raise RunError(f"the disk has {free >> 20} MiB left; this training needs {needed} MiB to start")

    def _launch(self, name: str) -> None:
        folder = self.folder(name)
        command = [sys.executable, "-m", "davae", "upgrade", str(folder / "recipe.yaml"), "--out", str(folder)]
        with slot.taken(self.root, name) as held, (folder / OUTPUT).open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the server reaches the training as a pause, through `close`
                pass_fds=[held.fileno()],  # the lock lives as long as the training does
            )
            slot.write(held, name, self.process.pid)
        self._ended.pop(name, None)

    def pause(self, name: str) -> None:
        """Ask a running training to save and stop after the step it is in.

        Raises:
            RunError: it does not run.
        """
        if not self.running(name):
            raise RunError(f"training '{name}' does not run")
        held = slot.holder(self.root)
        pid = held.pid if held is not None and held.name == name else running_process(self.folder(name))
        if not pid or not slot.asks_to_stop(pid, self.folder(name)):
            raise RunError(f"training '{name}' cannot be asked to pause yet; try again in a moment")

    def close(self, timeout: float = 60.0) -> None:
        """Pause the training that this page started and wait for its checkpoint, as the page ends."""
        end = time.monotonic() + timeout
        self._reap()
        while self.process is not None and time.monotonic() < end:
            with contextlib.suppress(RunError):  # it ended by itself, or cannot be asked yet
                self.pause(Path(self.process.args[-1]).name)  # type: ignore[index]
            again = time.monotonic() + 10
            while self.process is not None and time.monotonic() < min(again, end):
                time.sleep(0.1)
                self._reap()

    def state(self, name: str) -> State:
        """Return whether a training runs or is done, and a line on how far it came."""
        folder = self.folder(name)
        if not (folder / "recipe.yaml").is_file():
            return State(False, False, GONE)
        finished = self.report(name) is not None
        if self.running(name):
            return State(True, finished, f"running: {self._position(folder)}")
        if finished:
            return State(False, True, "finished: the report is written")
        if self._failed(name):
            return State(False, False, f"stopped: {last_line(folder / OUTPUT)}")
        return State(False, False, f"paused: {self._position(folder)}")

    def _failed(self, name: str) -> bool:
        """Return whether a training ended by an error, by its status or by its log."""
        code = self._ended.get(name)
        if code is not None:
            return code not in (130, -signal.SIGTERM)
        line = last_line(self.folder(name) / OUTPUT)
        return line.startswith("davae: ") and SAVED not in line

    def _position(self, folder: Path) -> str:
        """Return the stage and step that a run has reached, from its files."""
        done = {path.stem for path in (folder / "checkpoints").glob("*.done")}
        records = read_metrics(folder / "metrics.jsonl")
        try:
            recipe = load_recipe(str(folder / "recipe.yaml"))
        except RecipeError:  # whose message may hold values of the file
            return "its recipe.yaml cannot be read"
        if not isinstance(recipe, Recipe):
            return f"it trains '{recipe.name}', which the page does not follow"
        if "stage2" in done:
            return "writing the report"
        if "stage1" in done and not any(record["stage"] != "stage1" for record in records):
            return "detail VAE trained; caching latents"
        if not records:
            return "no step logged yet"
        last, names = records[-1], {"stage1": "stage 1, detail VAE", POLISH: "polish, decoder"}
        stage, trainings = names.get(last["stage"], "stage 2, transformer"), recipe.trainings
        steps = trainings.get(last["stage"], recipe.stage2).max_steps
        return f"{stage}: step {last['step']} of {steps}, {last.get('images_per_second', 0):.0f} images/s"

    def report(self, name: str) -> Path | None:
        """Return the report's page of a training, None before it is written."""
        page = self.folder(name) / "report.html"
        return page if page.is_file() and is_below(str(page.absolute()), self.root) else None

    def left_out(self, name: str) -> list[str]:
        """Return a line for each reason to leave images out, with the names of the first ones."""
        try:
            summary = read_object(self.folder(name) / SUMMARY, RunError)
        except RunError:  # not written yet
            return []
        first = summary.get("left_out_first", {})
        return [
            f"{count} {without_folders(reason)}: {named([shown_name(Path(one)) for one in first.get(reason, ())], count)}"
            for reason, count in summary.get("left_out", {}).items()
        ]

    def curves(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Return the losses of both stages so far: stage -> rows of step, value and curve."""
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
    """Return the last line that a process wrote, cut."""
    if not log.is_file():
        return "it wrote nothing"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LOG_END))
        lines = stream.read().decode("utf-8", errors="replace").split("\n")
    written = [line.strip() for line in lines if line.strip()]
    return without_folders(written[-1])[:300] if written else "it wrote nothing"
