"""Time left of a run of several phases, and times for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class TimeLeft:
    """Time left of a whole run.

    The current phase counts by its measured speed, later phases by their estimates.

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
        """Record that a task has done `step` of its `steps`."""
        if task != self.task:
            self.task, self.first = task, (step, self.clock())
        self.now = (step, max(1, steps))
        done, (step_then, then) = step, self.first
        estimate = self.estimates.get(task)
        if estimate and done > step_then:
            self.ratio = (self.clock() - then) / (done - step_then) * self.now[1] / estimate

    @property
    def seconds(self) -> float | None:
        """Return the seconds left, or None before the first step and in phases without an estimate."""
        if self.task not in self.estimates:
            return None
        step, steps = self.now
        names = list(self.estimates)
        later = sum(self.estimates[name] for name in names[names.index(self.task) + 1 :])
        return self.ratio * (self.estimates[self.task] * (steps - step) / steps + later)


def duration(seconds: float) -> str:
    """Return a time for people: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for large, small, big, little in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {big} {rest} {little}" if rest else f"{whole // large} {big}"
    return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
