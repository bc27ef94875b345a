"""State of a run folder: phases done and next, speed, losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from davae.files.reading import recipe_file
from davae.recipes import AnyRecipe, BaseRecipe, Recipe, load_recipe
from davae.recipes.stages import POLISH
from davae.train.locking import running_process
from davae.train.run_folder import is_done, read_metrics
from davae.train.times import read_times

# what a run of each kind goes through, and the training of each phase, where it has one
UPGRADE = {"stage1": "stage1", "cache": None, POLISH: POLISH, "stage2": "stage2", "report": None}
LOSSES = {
    "stage1": ("l1", "lpips", "align"),
    POLISH: ("l1", "lpips"),
    "stage2": ("loss_base", "loss_detail"),
    "vae": ("l1", "lpips"),
}
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class PhaseStatus:
    """State of one phase.

    Attributes:
        step, steps: of its training; None for a phase without one.
        seconds: spent in it so far, None where the run keeps no times.
        seconds_left: at the speed of the last logged steps; None where that is not known.
        losses: name -> the values logged last, oldest first.
    """

    name: str
    done: bool
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    Attributes:
        process: id of the process that trains in it now on this machine, None where none does.
        next: name of the first phase that is not done, None for a finished run.
    """

    recipe: str
    folder: str
    phases: list[PhaseStatus]
    next: str | None
    process: int | None

    @property
    def seconds_left(self) -> float | None:
        """Return the time left of the trainings, None where it is not known of one of them."""
        left = [phase.seconds_left for phase in self.phases if phase.steps is not None and not phase.done]
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if len(known) == len(left) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {**asdict(self), "seconds_left": self.seconds_left}


def read_status(folder: Path, recipe: AnyRecipe | None = None) -> RunStatus:
    """Return the state of a run folder without changing it.

    Args:
        recipe: the one that the run goes on with, such as one of more steps; the folder's own unless given.

    Raises:
        ModelError: it is not a run folder.
        RecipeError: its recipe cannot be read.
    """
    recipe = recipe or load_recipe(str(recipe_file(folder, "give the --out of a training")))
    metrics, timing = read_metrics(folder / "metrics.jsonl"), read_metrics(folder / "timing.jsonl")
    times = read_times(folder)
    phases = []
    for name, stage in phase_names(recipe).items():
        found = PhaseStatus(name, is_done(folder, recipe, name), seconds=times.get(name))
        phases.append(found if stage is None else _training(found, recipe, stage, folder, metrics, timing))
    following = next((phase.name for phase in phases if not phase.done), None)
    return RunStatus(recipe.name, str(folder), phases, following, running_process(folder))


def phase_names(recipe: AnyRecipe) -> dict[str, str | None]:
    """Return the phases of a run in order, each with the name of its training."""
    if isinstance(recipe, Recipe):
        base: dict[str, str | None] = {} if recipe.base.train is None else {"base": None}
        return {**base, **{name: stage for name, stage in UPGRADE.items() if name != POLISH or recipe.stage1.polish}}
    if isinstance(recipe, BaseRecipe):
        names = ["vae"] if recipe.vae is not None else []
        names += ["align.embedder", "align.head"] if recipe.align is not None else []
        return {name: name for name in (*names, "dit")}
    return {"network": "network"}


def _training(
    phase: PhaseStatus,
    recipe: AnyRecipe,
    stage: str,
    folder: Path,
    metrics: list[dict[str, Any]],
    timing: list[dict[str, Any]],
) -> PhaseStatus:
    settings: Any = recipe
    for part in stage.split("."):
        settings = getattr(settings, part)
    records = [record for record in metrics if record["stage"] == stage]
    speeds = [record["seconds_step"] for record in timing if record["stage"] == stage and "seconds_step" in record]
    saved = [p.name.rpartition("-")[2] for p in (folder / "checkpoints").glob(f"{stage}-[0-9]*") if p.is_dir()]
    step = max(records[-1]["step"] if records else 0, *map(int, filter(str.isdecimal, saved)), 0)
    step = settings.max_steps if phase.done else min(step, settings.max_steps)
    recent = speeds[-10:]
    left = (settings.max_steps - step) * sum(recent) / len(recent) if recent else None
    names = LOSSES.get(stage, ("loss",))
    losses = {name: [record[name] for record in records if name in record] for name in names}
    return PhaseStatus(
        phase.name,
        phase.done,
        step,
        settings.max_steps,
        phase.seconds,
        0.0 if phase.done else left,
        {name: values for name, values in losses.items() if values},
    )


def sparkline(values: list[float], width: int = 40) -> str:
    """Return values as a line of block characters, each the mean of an equal part."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(place * len(finite) / count) for place in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    spread = (high - low) or 1.0
    return "".join(BARS[round((value - low) / spread * (len(BARS) - 1))] for value in means)
