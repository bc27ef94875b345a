"""Observation of a training: times, gradient norms, warnings that name a cause, trackers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from davae.files.atomic import saving
from davae.recipes.sections import Run
from davae.train.distributed import is_main, sum_over_ranks
from davae.train.state_dict import like, local

logger = logging.getLogger(__name__)

WeightGroups = dict[str, list[tuple[nn.Parameter, Tensor | None]]]  # parameters of each group, with a mask of entries


class StepTimer:
    """Seconds of each phase of a step, on a GPU by events that need no stop in each step."""

    PHASES = ("data", "forward", "backward", "optimizer")

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self._restart()

    def _restart(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(self.PHASES, 0.0)
        self.events: list[tuple[str, Any, Any]] = []
        self.steps, self.started = 0, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.gpu and name != "data":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Return seconds a step since the last reading, in all and by phase, after the GPU's work."""
        if self.gpu:
            torch.cuda.synchronize()
            for name, begin, end in self.events:
                self.seconds[name] += begin.elapsed_time(end) / 1000
        steps = max(1, self.steps)
        figures = {"seconds_step": (time.perf_counter() - self.started) / steps}
        figures |= {f"seconds_{name}": seconds / steps for name, seconds in self.seconds.items()}
        self._restart()
        return figures


class Means:
    """Mean of each logged value over the micro-batches of a step."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add values of one trainable on one micro-batch: numbers, or scalars on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, Any]:
        """Return the means, a value that was added once as it came."""
        return {name: total / n if (n := self.counts[name]) > 1 else total for name, total in self.sums.items()}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, GiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return cast(Any, psutil.Process().memory_info()).peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def gradient_norms(parts: WeightGroups) -> dict[str, Tensor]:
    """Return the gradient norm of each group before clipping. Collective under FSDP2."""
    norms = {}
    for group, entries in parts.items():
        squares, pieces = [], False
        for parameter, mask in entries:
            if parameter.grad is None:
                continue
            gradient = local(parameter.grad).float()
            if mask is not None:
                gradient = gradient * local(like(mask, parameter.detach()))
            squares.append(gradient.square().sum())
            pieces = pieces or isinstance(parameter, DTensor)
        if squares:
            total = torch.stack(squares).sum()
            norms[f"grad_norm_{group}"] = (sum_over_ranks(total) if pieces else total).sqrt()
    return norms


class RunWarnings:
    """Warnings of a training that wastes time, of waiting and of dead weights each once."""

    WAITING = 0.2  # share of a step spent waiting for data
    DEAD = 5  # logged steps in a row with a gradient that is exactly zero

    def __init__(self, task: str, num_workers: int, skipped: int):
        self.task, self.num_workers, self.skipped_before = task, num_workers, skipped
        self.zero: dict[str, int] = {}
        self.warned: set[str] = set()

    def _warn_once(self, about: str, text: str, *values: Any) -> None:
        if about not in self.warned:
            self.warned.add(about)
            logger.warning(f"%s: {text}", self.task, *values)

    def times(self, figures: Mapping[str, float]) -> None:
        """Warn where the figures of `StepTimer.read` show much waiting for data."""
        waiting = figures["seconds_data"] / max(figures["seconds_step"], 1e-9)
        if waiting > self.WAITING:
            self._warn_once(
                "data",
                "%.0f %% of a step is spent waiting for data; raise data.num_workers (now %d), or use a faster disk",
                100 * waiting,
                self.num_workers,
            )

    def gradients(self, values: Mapping[str, float]) -> None:
        """Warn where the logged norms of new weights stay zero: such weights never learn."""
        for name in ("grad_norm_P'", "grad_norm_O'"):
            if name in values and values.get("detail_weight", 1.0) > 0:
                self.zero[name] = self.zero.get(name, 0) + 1 if values[name] == 0 else 0
                if self.zero[name] == self.DEAD:
                    self._warn_once(
                        name,
                        "the gradient of %s is exactly zero at %d logged steps in a row: these new weights do not learn; "
                        "look at lambda_kl and lambda_align of stage 1 (is z_d constant?) and at warmup_steps",
                        name.removeprefix("grad_norm_"),
                        self.DEAD,
                    )

    def skipped(self, total: int, step: int) -> None:
        """Warn where more steps were skipped, in all, than at the last logged step."""
        if total > self.skipped_before:
            logger.warning(
                "%s: %d step(s) until step %d skipped, their gradient is not finite (%d so far)",
                *(self.task, total - self.skipped_before, step, total),
            )
            self.skipped_before = total


class Timings:
    """Writer of timing.jsonl, apart from metrics.jsonl, which is the same on every machine."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        with saving(self.path), self.path.open("a", encoding="utf-8") as stream:
            rounded = {name: round(value, 6) for name, value in figures.items()}
            stream.write(json.dumps({"stage": self.stage, "step": step, **rounded}) + "\n")


def open_trackers(accelerator: Accelerator, run: Run, folder: Path, task: str, config: dict[str, Any]) -> None:
    """Start the recipe's trackers in the first process, once a launch, and name a task to them."""
    if run.trackers and not accelerator.trackers:
        place = Path(os.path.realpath(folder))
        unique = f"{place.name}-{hashlib.sha256(bytes(place)).hexdigest()[:8]}"  # folders may have equal names
        options = {"wandb": {"name": place.name, "dir": str(folder), "id": unique, "resume": "allow"}}
        accelerator.init_trackers(
            "davae",
            config={key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))},
            init_kwargs={name: options[name] for name in run.trackers if name in options},
        )
    for tracker in accelerator.trackers if is_main() else ():
        if tracker.name == "wandb":
            prefix = wandb_prefix(task)
            tracker.tracker.define_metric(f"{prefix}/step")
            tracker.tracker.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")


def wandb_prefix(task: str) -> str:
    """Return a task's name in wandb, which takes a dot for a level of nested values."""
    return task.replace(".", "-")


def log_to_trackers(accelerator: Accelerator, task: str, step: int, values: Mapping[str, float]) -> None:
    """Log a task's values to all trackers.

    The steps of each task begin at 1. wandb drops what is logged below its own step, so the task's step is a value there.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            prefix = wandb_prefix(task)
            tracker.log({**{f"{prefix}/{key}": value for key, value in values.items()}, f"{prefix}/step": step})
        else:
            tracker.log({f"{task}/{key}": value for key, value in values.items()}, step=step)
