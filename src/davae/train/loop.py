"""The one training loop: base pretraining, stage 1 and stage 2 are tasks that run in it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from davae.data.order import Batches, training_loader
from davae.recipes.schema import Optim, Run
from davae.train.state import Interrupted, Metrics, RunError, RunFolder, load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Player:
    """One optimizer and what it trains. `groups`: AdamW groups, each may carry its own `lr_multiplier`."""

    module: nn.Module
    groups: list[dict[str, Any]]
    lr: float
    ema: bool = True
    clip: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]


class Task(Protocol):
    """What a stage brings to the loop."""

    name: str
    players: dict[str, Player]
    modules: dict[str, nn.Module]  # called in `loss`; the loop replaces them by their accelerate-wrapped selves
    dataset: Any  # its `groups`: the bucket of every item
    collate: Callable[[list[Any]], Any]

    @property
    def settings(self) -> Optim: ...

    def active(self, step: int) -> list[str]:
        """Players whose turn it is at this step, in order."""
        ...

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """A chance to hook into a player's optimizer before training."""
        ...

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Scalar loss of one player, and what to log. Called in the order of `active` on the same batch."""
        ...


@dataclass
class Progress:
    """What a display gets to know after each step."""

    task: str
    step: int
    max_steps: int
    images_per_second: float
    values: dict[str, float] = field(default_factory=dict)


Observer = Callable[[Progress], None]


def step_generator(seed: int, stage: str, batch: int, rank: int) -> torch.Generator:
    """All randomness of one batch hangs on this: resuming needs no saved random state."""
    mixed = hash((seed, batch, rank, *stage.encode())) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator().manual_seed(mixed)


def training_seed(settings: Optim, run: Run) -> int:
    """The seed of one training: its own, else the run's."""
    return run.seed if settings.seed is None else settings.seed


def learning_rate(settings: Optim, lr: float, step: int) -> float:
    """Linear warm-up, then constant or cosine to zero, `lr_cycles` times over; `step` counts from 0."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * (settings.lr_cycles * min(1.0, progress) % 1.0)))


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """SIGINT and SIGTERM set a flag that the loop reads between steps."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _: received.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """Runs one task to its last step, from its newest checkpoint if there is one.

    Raises:
        Interrupted: after a signal, with a checkpoint written.
        RunError: when the loss stays non-finite, or the folder cannot be written.
    """

    MAX_SKIPPED = 10  # non-finite steps in a row

    def __init__(
        self,
        task: Task,
        run: Run,
        folder: RunFolder,
        accelerator: Accelerator,
        observer: Observer | None = None,
    ):
        self.task, self.run, self.folder, self.accelerator = task, run, folder, accelerator
        self.observer = observer or (lambda progress: None)
        self.optimizers: dict[str, Any] = {}
        self.ema: dict[str, EMAModel] = {}
        self.skipped = 0
        settings = task.settings
        self.seed = training_seed(settings, run)
        for name, player in task.players.items():
            groups = [{"lr_multiplier": 1.0, **group} for group in player.groups]
            self.optimizers[name] = torch.optim.AdamW(
                groups, lr=player.lr, betas=settings.betas, weight_decay=settings.weight_decay
            )
            task.prepare_optimizer(name, self.optimizers[name])
            if player.ema and settings.ema_decay:
                self.ema[name] = EMAModel(player.parameters, decay=settings.ema_decay, foreach=True)
        self.step = self._resume()
        for name, module in task.modules.items():
            task.modules[name] = accelerator.prepare(module)
        for name, optimizer in self.optimizers.items():
            self.optimizers[name] = accelerator.prepare(optimizer)
        for average in self.ema.values():
            average.to(accelerator.device)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        checkpoints = self.folder.checkpoints(self.task.name)
        if not checkpoints:
            return 0
        state = load_checkpoint(checkpoints[-1])
        for name, player in self.task.players.items():
            restore(player, state["players"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, average in self.ema.items():
            average.load_state_dict(state["ema"][name])
        self.skipped = state["skipped"]
        logger.info("%s: resumed at step %d from %s", self.task.name, state["step"], checkpoints[-1])
        return state["step"]

    def save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "skipped": self.skipped,
                "players": {name: snapshot(player) for name, player in self.task.players.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "ema": {name: average.state_dict() for name, average in self.ema.items()},
            }
            save_checkpoint(self.folder, self.task.name, self.step, state, self.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def use_average(self) -> None:
        """Copy each EMA into its player: what is exported."""
        for name, average in self.ema.items():
            average.copy_to(self.task.players[name].parameters)

    # -- training ----------------------------------------------------------------------------------------------

    def fit(self, num_workers: int = 0) -> None:
        settings, accelerator = self.task.settings, self.accelerator
        if self.step >= settings.max_steps:
            return
        metrics = Metrics(self.folder.path / "metrics.jsonl", self.task.name, self.step)
        batches = Batches(
            len(self.task.dataset),
            settings.batch_size,
            seed=self.seed,
            start=self.step * settings.accumulation,
            stop=settings.max_steps * settings.accumulation,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            groups=self.task.dataset.groups,
        )
        loader = iter(
            training_loader(self.task.dataset, batches, num_workers=num_workers, collate_fn=self.task.collate)
        )
        bad_in_a_row = 0
        try:
            with stop_on_signal() as received:
                while self.step < settings.max_steps:
                    started = time.perf_counter()
                    values, finite = self._train_step(loader)
                    self.step += 1
                    bad_in_a_row = 0 if finite else bad_in_a_row + 1
                    self._report(values, time.perf_counter() - started, metrics)
                    if bad_in_a_row >= self.MAX_SKIPPED:
                        raise RunError(
                            f"{self.task.name}: the loss was not finite for {bad_in_a_row} steps in a row, until step "
                            f"{self.step}; lower {self.task.name}.lr and start again from the last checkpoint"
                        )
                    last = self.step == settings.max_steps
                    if last or received or self.step % self.run.checkpoint_every == 0:
                        self.save()
                    if received and not last:
                        raise Interrupted(
                            f"{self.task.name}: stopped at step {self.step} of {settings.max_steps}, saved; "
                            "run the same command again to go on"
                        )
        finally:
            metrics.close()
            del loader

    def _train_step(self, loader: Iterator[Any]) -> tuple[dict[str, Any], bool]:
        settings, accelerator = self.task.settings, self.accelerator
        values: dict[str, Any] = {}
        active = self.task.active(self.step)
        for name in active:
            self.optimizers[name].zero_grad(set_to_none=True)
        for part in range(settings.accumulation):
            batch = next(loader)
            number = self.step * settings.accumulation + part
            generator = step_generator(self.seed, self.task.name, number, accelerator.process_index)
            for name in active:
                loss, logged = self.task.loss(name, batch, self.step, generator)
                accelerator.backward(loss / settings.accumulation)
                values |= logged
        finite = True
        for name in active:
            player, optimizer = self.task.players[name], self.optimizers[name]
            lr = learning_rate(settings, player.lr, self.step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            limit = settings.max_grad_norm if player.clip else math.inf
            norm = accelerator.clip_grad_norm_(player.parameters, limit)
            values[f"grad_norm_{name}"] = norm
            if norm is not None and not torch.isfinite(norm) and accelerator.scaler is None:
                self.skipped += 1
                finite = False
                logger.warning(
                    "%s: step %d of %s skipped, its gradient is not finite (%d so far)",
                    self.task.name,
                    self.step + 1,
                    name,
                    self.skipped,
                )
                continue
            optimizer.step()
            if name in self.ema:
                self.ema[name].step(player.parameters)
        values["lr"] = learning_rate(settings, next(iter(self.task.players.values())).lr, self.step)
        values["skipped"] = self.skipped
        return values, finite

    def _report(self, values: dict[str, Any], seconds: float, metrics: Metrics) -> None:
        settings, accelerator = self.task.settings, self.accelerator
        if self.step % self.run.log_every and self.step != settings.max_steps:
            return
        images = settings.batch_size * settings.accumulation * accelerator.num_processes
        plain = {key: round(float(value), 8) for key, value in values.items() if value is not None}
        speed = images / seconds
        if accelerator.is_main_process:
            metrics.write(self.step, {**plain, "images_per_second": round(speed, 3)})
            self.observer(Progress(self.task.name, self.step, settings.max_steps, speed, plain))


def snapshot(player: Player) -> dict[str, Tensor]:
    """Trained parameters (and buffers) of a player by name."""
    trained = {name: p.detach() for name, p in player.module.named_parameters() if p.requires_grad}
    return trained | {name: b.detach() for name, b in player.module.named_buffers()}


def restore(player: Player, state: dict[str, Tensor]) -> None:
    """Put a snapshot back; the names must agree exactly."""
    own = snapshot(player)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[0]
        raise RunError(f"the checkpoint does not fit this model: '{odd}' stands in only one of them; use a new --out")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
