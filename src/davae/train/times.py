"""Seconds that each phase of a run took, over all its starts: `times.json` in the run folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from davae.errors import RunError
from davae.files import atomic_text
from davae.reading import load_json

logger = logging.getLogger(__name__)

TIMES = "times.json"
# in the order in which runs go through them
PHASES = ("base", "vae", "align.embedder", "align.head", "dit", "network", "stage1", "cache", "stage2", "report")


def read_times(folder: Path) -> dict[str, float]:
    """Return the seconds of each phase; nothing for a run that has none, as runs of earlier versions."""
    times = _read(folder / TIMES)
    if base := _read(folder / "base" / TIMES):
        times["base"] = sum(base.values())
    return {name: times[name] for name in PHASES if name in times}


def _read(file: Path) -> dict[str, float]:
    try:
        values = load_json(file.read_bytes())
        return {str(name): float(seconds) for name, seconds in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, OverflowError):
        logger.warning("%s is damaged; the times of the phases before are not known any more", file)
        return {}


class TimeLeft:
    """Time left of a whole run: the phase at hand by its measured speed, later ones by their estimates.

    Estimates are scaled by how far the last measured phase was from its own.

    Args:
        estimates: seconds of each phase, in order.
        clock: returns the time in seconds.
    """

    def __init__(self, estimates: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        self.estimates, self.clock = dict(estimates), clock
        self.task, self.first, self.now = "", (0, 0.0), (0, 1)
        self.ratio = 1.0

    def observe(self, task: str, step: int, steps: int) -> None:
        """Take a step of a task, of so many."""
        if task != self.task:
            self.task, self.first = task, (step, self.clock())
        self.now = (step, max(1, steps))
        done, (step_then, then) = step, self.first
        estimate = self.estimates.get(task)
        if estimate and done > step_then:
            self.ratio = (self.clock() - then) / (done - step_then) * self.now[1] / estimate

    @property
    def seconds(self) -> float | None:
        """Return the seconds left; None while a phase without an estimate runs, or before the first step."""
        if self.task not in self.estimates:
            return None
        step, steps = self.now
        names = list(self.estimates)
        later = sum(self.estimates[name] for name in names[names.index(self.task) + 1 :])
        return self.ratio * (self.estimates[self.task] * (steps - step) / steps + later)


@contextmanager
def timed(folder: Path, phase: str) -> Iterator[None]:
    """Add the seconds spent inside to a phase's, also where it is interrupted. Only the first process writes."""
    from davae.train.ranks import is_main  # it loads torch, which those who only read times need not

    started = time.monotonic()
    try:
        yield
    finally:
        if is_main() and folder.is_dir():
            times = _read(folder / TIMES)
            times[phase] = round(times.get(phase, 0.0) + time.monotonic() - started, 3)
            try:
                atomic_text(folder / TIMES, json.dumps(times, indent=1) + "\n")
            except (RunError, OSError) as error:  # the run's own error, if any, is the one to show
                logger.warning("the times of the phases are not kept: %s", error)


def duration(seconds: float) -> str:
    """Return a time for people: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for large, small, big, little in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {big} {rest} {little}" if rest else f"{whole // large} {big}"
    return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
