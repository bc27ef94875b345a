"""Training loop of every stage: base pretraining, stage 1 and stage 2 are its tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from davae.data.batches import Passes, chosen_workers, training_loader
from davae.device import compile_blocks
from davae.errors import Interrupted, RunError
from davae.recipes.sections import Optim, Run
from davae.train.accelerator import (
    LossScale,
    check_engine,
    clip_gradients,
    gather_optimizer,
    load_optimizer,
    step_unless,
    wrap,
)
from davae.train.distributed import any_rank, barrier, from_main, is_main, mean_over_ranks, rank, ranks
from davae.train.ema import Average
from davae.train.monitor import (
    Means,
    RunWarnings,
    StepTimer,
    Timings,
    gradient_norms,
    log_to_trackers,
    open_trackers,
    peak_memory_gib,
)
from davae.train.optimizers import build_optimizer, learning_rate
from davae.train.random import SampleRandom
from davae.train.run_folder import Best, Metrics, RunFolder, newest_checkpoint, save_checkpoint
from davae.train.shares import share_of_step
from davae.train.signals import stop_on_signal
from davae.train.state_dict import load_optimizer_state, optimizer_state, restore, snapshot
from davae.train.task import Task
from davae.train.times import timed

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """State of a training after a step, for a display."""

    task: str
    step: int
    max_steps: int
    images_per_second: float
    values: dict[str, float] = field(default_factory=dict)


Observer = Callable[[Progress], None]


@dataclass(frozen=True)
class Periodic:
    """Work that all processes do every `every` steps.

    Attributes:
        run: step -> values to log. The lowest value of the name BEST marks the best checkpoint.
    """

    every: int
    run: Callable[[int], dict[str, float]]


def training_seed(settings: Optim, run: Run) -> int:
    """Return the seed of one training: its own, else the run's."""
    return run.seed if settings.seed is None else settings.seed


class Trainer:
    """Trains one task to its last step, from its newest checkpoint if there is one.

    All processes together train on `batch_size` x `accumulation` images of the recipe in a step. Each takes an equal share,
    in the passes that `share_of_step` finds. Any number of processes sees the same samples with the same noise.

    Args:
        task: the stage.
        run: the recipe's section.
        folder: takes checkpoints and metrics.
        accelerator: the engine.
        observer: called after every logged step.
        periodic: validation and images of progress.

    Raises:
        Interrupted: after a signal, with a checkpoint written.
        RunError: the loss stays non-finite, no step was taken, the batch cannot be divided, or the folder cannot be written.
    """

    MAX_SKIPPED = 10  # non-finite steps in a row

    def __init__(
        self,
        task: Task[Any],
        run: Run,
        folder: RunFolder,
        accelerator: Accelerator,
        observer: Observer | None = None,
        periodic: Sequence[Periodic] = (),
    ):
        self.task, self.run, self.folder, self.accelerator = task, run, folder, accelerator
        self.observer, self.periodic = observer or (lambda progress: None), periodic
        settings = task.settings
        hardware = getattr(folder.recipe, "hardware", None)
        self.share = share_of_step(settings, task.name, ranks(), hardware)
        self.seed = training_seed(settings, run)
        self.step = 0
        passes = settings.model_copy(update={"accumulation": self.share.passes})
        check_engine(accelerator, task.name, len(task.trainables), passes)
        open_trackers(accelerator, run, folder.path, task.name, settings.model_dump())
        state = newest_checkpoint(folder, task.name)
        if state is not None:
            for name, trainable in task.trainables.items():
                restore(trainable.module, trainable.trained, state["players"][name])
        self.optimizers: dict[str, Any] = {}
        self.ema: dict[str, Average] = {}
        for name, trainable in task.trainables.items():
            if run.compile == "blocks":
                mixed = run.mixed_precision != "no"
                compile_blocks(trainable.module, accelerator.device if mixed else None)
            optimizer = build_optimizer(settings, trainable.groups, trainable.lr)
            task.prepare_optimizer(name, optimizer)
            task.modules[name], self.optimizers[name] = wrap(
                accelerator, task.modules[name], optimizer, self.share.images
            )
            if trainable.ema and settings.ema_decay:
                device = torch.device("cpu") if run.ema_device == "cpu" else None
                self.ema[name] = Average(trainable.parameters, settings.ema_decay, device)
        device = accelerator.device
        # counted on the loss's device, so that no step waits for it: steps skipped in all, and in a row until now
        self.skipped, self.in_a_row = torch.zeros(2, device=device).unbind()
        self.best = Best(folder.path, task.name)
        self.scale = LossScale(accelerator)
        if state is not None:
            self._load(state)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _load(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name], load_optimizer_state)
        for name, average in self.ema.items():
            average.load_state_dict(state["ema"][name])
        self.scale.load(state.get("scaler", {}))
        self.skipped += state["skipped"]
        self.step, self.best.value = state["step"], state["best"]
        logger.info("%s: resumed at step %d", self.task.name, self.step)

    def save(self) -> None:
        """Write a checkpoint. Collective: all gather, the first process writes, the others wait."""
        state = {
            "step": self.step,
            "skipped": int(self.skipped),
            "best": self.best.value,
            "players": {name: snapshot(p.module, p.trained) for name, p in self.task.trainables.items()},
            "optimizers": {name: gather_optimizer(o, optimizer_state) for name, o in self.optimizers.items()},
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
        }
        if scaler := self.scale.state():
            state["scaler"] = scaler
        if is_main():
            best, every = self.best.kept(), self.run.keep_every
            save_checkpoint(
                self.folder,
                self.task.name,
                self.step,
                state,
                self.run.keep_checkpoints,
                lambda step: step == best or (every > 0 and step % every == 0),
            )
        barrier()

    def use_average(self) -> None:
        """Copy each average into the weights, for the export."""
        for average in self.ema.values():
            average.copy_to_parameters()

    def whole_state(self, name: str) -> dict[str, Tensor]:
        """Return a trainable's parameters and buffers, whole, on the CPU. Collective."""
        return snapshot(self.task.trainables[name].module, self.task.trainables[name].trained)

    def release(self) -> None:
        """Free the optimizers, the averages and accelerate's references to them."""
        self.optimizers.clear()
        self.ema.clear()
        self.accelerator.free_memory()

    # -- training ----------------------------------------------------------------------------------------------

    def fit(self, num_workers: int | None = 0) -> None:
        """Train from the newest checkpoint to the last step."""
        try:
            if self.step < self.task.settings.max_steps:
                with timed(self.folder.path, self.task.name):
                    self._fit(chosen_workers(num_workers))
        finally:
            self.scale.reset()
        if self.step and int(self.skipped) >= self.step:
            raise RunError(
                f"{self.task.name}: all {self.step} steps were skipped, their loss or gradient was not finite, so nothing "
                f"was trained; look at the data, or lower {self.task.name}.lr, in a new --out"
            )

    def _fit(self, num_workers: int) -> None:
        settings = self.task.settings
        metrics = Metrics(self.folder.path / "metrics.jsonl", self.task.name, self.step) if is_main() else None
        timings = Timings(self.folder.path / "timing.jsonl", self.task.name)
        batches = Passes(
            len(self.task.dataset),
            settings.batch_size,
            seed=self.seed,
            start=self.step * settings.accumulation,
            stop=settings.max_steps * settings.accumulation,
            groups=self.task.dataset.groups,
            own=self.share.images,
            rank=rank(),
            ranks=ranks(),
        )
        loader = iter(
            training_loader(self.task.dataset, batches, num_workers=num_workers, collate_fn=self.task.collate)
        )
        self.timer = StepTimer(self.accelerator.device)
        self.watch = RunWarnings(self.task.name, num_workers, int(self.skipped))
        try:
            with stop_on_signal(self.run.stop_signals) as received:
                while self.step < settings.max_steps:
                    values = self._train_step(loader)
                    self.step += 1
                    self.timer.steps += 1
                    last = self.step == settings.max_steps
                    extra = self._periodic()
                    logs = bool(extra) or last or self.step % self.run.log_every == 0
                    if logs:
                        self._report({**values, **extra}, metrics, timings)
                    improved = self.best.improved(extra, self.step)
                    stop = (logs or ranks() == 1) and any_rank(bool(received), self.accelerator.device)
                    broken = logs and any_rank(int(self.in_a_row) >= self.MAX_SKIPPED, self.accelerator.device)
                    if last or stop or broken or improved or self.step % self.run.checkpoint_every == 0:
                        if metrics is not None:
                            metrics.to_disk()
                        self.save()
                    if broken:
                        self._give_up()
                    if stop:  # also in the last step: the stages that follow take hours as well
                        raise Interrupted(
                            f"{self.task.name}: stopped at step {self.step} of {settings.max_steps}, saved; "
                            "run the same command again to go on"
                        )
        finally:
            if metrics is not None:
                metrics.close()
            del loader

    def _periodic(self) -> dict[str, float]:
        """Do the periodic work due at this step and return the first process's values."""
        due = [entry for entry in self.periodic if self.step % entry.every == 0]
        found: dict[str, float] = {}
        for entry in due:
            found |= entry.run(self.step)
        return from_main(found) if due else {}

    def _give_up(self) -> None:
        raise RunError(
            f"{self.task.name}: the loss was not finite for {int(self.in_a_row)} steps in a row, until step {self.step}; "
            f"the weights before them are saved; lower {self.task.name}.lr in a new --out"
        )

    def _train_step(self, loader: Iterator[Any]) -> dict[str, Any]:
        settings, timer = self.task.settings, self.timer
        means, lost = Means(), torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        active = self.task.trainables_at(self.step)
        for name in active:
            lr = learning_rate(settings, self.task.trainables[name].lr, self.step)
            for group in self.optimizers[name].param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            self.optimizers[name].zero_grad(set_to_none=True)
        own, passes = self.share.images, self.share.passes
        for part in range(passes):
            with timer.phase("data"):
                batch = next(loader)
            first = ((self.step * passes + part) * ranks() + rank()) * own  # place in the stream of all samples
            draws = SampleRandom(self.seed, self.task.name, *divmod(first, settings.batch_size), own)
            for name in active:
                with ExitStack() as stack:
                    if part < passes - 1:  # gradients stay in the process until the last part
                        stack.enter_context(self.accelerator.no_sync(self.task.modules[name]))
                    with timer.phase("forward"):
                        loss, logged = self.task.loss(name, batch, self.step, draws)
                    with timer.phase("backward"):
                        self.accelerator.backward(loss / passes)
                    lost = lost | ~torch.isfinite(loss.detach())
                means.add(logged)
        values = means.read()
        with timer.phase("optimizer"):
            bad = torch.zeros_like(lost)
            for name in active:
                bad = bad | self._update(name, values)
            self.skipped += bad
            self.in_a_row.copy_((self.in_a_row + self.scale.counts(bad, lost)) * bad)
            self.scale.update()
        values["lr"] = learning_rate(settings, next(iter(self.task.trainables.values())).lr, self.step)
        return values

    def _update(self, name: str, values: dict[str, Any]) -> Tensor:
        """Step one optimizer where its gradient is finite, and return whether it was not."""
        trainable, optimizer = self.task.trainables[name], self.optimizers[name]
        self.scale.unscale(optimizer)
        if trainable.parts is not None and (self.step + 1) % self.run.log_every == 0:
            values |= gradient_norms(trainable.parts())
        limit = self.task.settings.max_grad_norm if trainable.clip else math.inf
        norm = clip_gradients(self.accelerator, optimizer, limit)
        values[f"grad_norm_{name}"] = norm
        if norm is None:  # the engine clips and skips by itself
            optimizer.step()
            bad = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        else:
            bad = ~torch.isfinite(norm)
            step_unless(optimizer, bad)
        if name in self.ema:
            self.ema[name].step()
        return bad

    def _report(self, values: dict[str, Any], metrics: Metrics | None, timings: Timings) -> None:
        settings, accelerator = self.task.settings, self.accelerator
        numbers = {
            key: torch.as_tensor(value).detach().cpu().double()  # not on the device: Apple's has no float64
            for key, value in values.items()
            if value is not None
        }
        mean = torch.stack(list(numbers.values()))
        if ranks() > 1:
            mean = mean_over_ranks(mean.to(accelerator.device))
        plain = {key: round(value, 8) for key, value in zip(numbers, mean.tolist(), strict=True)}
        plain["skipped"] = int(self.skipped)
        figures = self.timer.read() | {"memory_gib": peak_memory_gib(accelerator.device)}
        images = settings.batch_size * settings.accumulation / figures["seconds_step"]
        if metrics is None:
            return
        metrics.write(self.step, {**plain, "images_per_second": round(images, 3)})
        timings.write(self.step, {**figures, "images_per_second": images})
        log_to_trackers(accelerator, self.task.name, self.step, {**plain, **figures})
        self.watch.times(figures)
        self.watch.gradients(plain)
        self.watch.skipped(plain["skipped"], self.step)
        self.observer(Progress(self.task.name, self.step, settings.max_steps, images, plain))
