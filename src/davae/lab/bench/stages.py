"""`davae bench stage1` and `stage2`: the trainer's step against a plain implementation.

Both take the same images and noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from davae.backbones.families import denoiser
from davae.errors import RecipeError
from davae.evaluate.throughput import synchronise
from davae.lab.bench.clock import Spread, machine, ratio
from davae.lab.bench.plain import PlainStage1, PlainStage2
from davae.losses.flow_matching import sample_timesteps
from davae.losses.perceptual import Lpips, random_lpips
from davae.pretrained.prompting import embed_captions
from davae.recipes.sections import Stage1
from davae.recipes.upgrade import Recipe
from davae.runs.upgrade import Upgrade
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.loop import Progress, Trainer, learning_rate
from davae.train.random import SampleRandom
from davae.train.run_folder import read_metrics

PARTS = ("data", "forward", "backward", "optimizer")  # of a step, as the trainer times them


@dataclass
class Turn:
    """One step as the trainer saw it: its batch, and where its noise came from."""

    step: int
    batch: Any
    draws: SampleRandom


@dataclass
class StepRecorder:
    """Stands before a task's first player and writes down what it was given."""

    task: Any
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loss, self._first = self.task.loss, next(iter(self.task.trainables))
        self.task.loss = self.loss

    def loss(self, player: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        if player == self._first:
            self.turns.append(Turn(step, batch, draws.restarted()))
        return self._loss(player, batch, step, draws)


@dataclass
class PairedSteps:
    """Observer of a trainer that runs a plain implementation's step after each of its steps.

    Both take the same batch, noise and weights.

    Rounding grows about tenfold with every step of Adam, so each step starts from the trainer's weights, and only the two
    steps are timed.

    Args:
        play: fetches the opponent's pictures and returns its step, which gives its loss. Fetching is not timed.
        follow: gives the opponent the trainer's weights.
        accelerator: the trainer's, whose mixed precision is the opponent's too.

    Attributes:
        ours, plain: seconds of each step. losses: (trainer's, opponent's) of each step. parts: seconds of each part of the
            trainer's steps but the first.
    """

    recorder: StepRecorder
    play: Callable[[Turn], Callable[[], float]]
    follow: Callable[[], None]
    accelerator: Accelerator
    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = self._clock()

    def __call__(self, progress: Progress) -> None:
        self.ours.append(self._clock() - self._before)
        step = self.play(self.recorder.turns[-1])
        started = self._clock()
        with self.accelerator.autocast():
            loss = step()
        self.plain.append(self._clock() - started)
        self.losses.append((progress.values["loss"], loss))
        self.follow()
        self._before = self._clock()

    def end(self, folder: Path) -> None:
        """Take the parts of the steps as the trainer timed them itself."""
        records = read_metrics(folder / "timing.jsonl")
        self.parts = [{part: record[f"seconds_{part}"] for part in PARTS} for record in records[1:]]

    @staticmethod
    def _clock() -> float:
        synchronise()  # a GPU may still be at the step's last kernels
        return time.perf_counter()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for own, other in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(other)


def result(duels: list[PairedSteps], batch: int) -> dict[str, Any]:
    """Return figures of all repeats, without the time of each one's first step."""
    fast = Spread.of([seconds for duel in duels for seconds in duel.ours[1:]])
    slow = Spread.of([seconds for duel in duels for seconds in duel.plain[1:]])
    losses = [pair for duel in duels for pair in duel.losses]
    parts = [step for duel in duels for step in duel.parts]
    return {
        "batch": batch,
        "davae_seconds": fast.as_dict(),
        "davae_parts_seconds": {part: median(step[part] for step in parts) for part in PARTS},
        "plain_seconds": slow.as_dict(),
        "davae_images_per_second": batch / fast.median,
        "plain_images_per_second": batch / slow.median,
        "speedup": ratio(slow, fast),
        "largest_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
        "losses_compared": len(losses),
        "machine": machine(),
    }


def quick(recipe: Recipe, stage: str, steps: int) -> Recipe:
    """Return the recipe with one stage of `steps` steps, each of them logged."""
    settings = getattr(recipe, stage).model_copy(update={"max_steps": steps, "lr_warmup_steps": 0})
    run = recipe.run.model_copy(update={"log_every": 1, "checkpoint_every": steps})
    return recipe.model_copy(update={stage: settings, "run": run})


def paper_losses(settings: Stage1, weights: Path) -> Stage1:
    """All terms of Eq. 5-6 from the first step: LPIPS on VGG, the GAN, both adaptive weights.

    The VGG is random, as its weights cannot be had everywhere: its speed does not depend on them.
    """
    return settings.model_copy(
        update={
            "lambda_lpips": 1.0,
            "perceptual": "lpips-vgg",
            "perceptual_weights": str(weights),
            "lambda_adv": 0.1,
            "gan_start": 0,
            "lambda_align": 0.5,
            "alignment": "adaptive",
            "detail_dropout": 0.0,
            "crop": None,
        }
    )


def bench_stage1(recipe: Recipe, *, steps: int, repeats: int, follow: bool = True) -> dict[str, Any]:
    """Compare the trainer's stage 1 with `PlainStage1` on the recipe's model, losses and images.

    Both run in the recipe's precision. The trainer keeps its losses in float32, the plain one leaves them to autocast: equal
    to 1e-4 in float32 alone.

    Args:
        follow: False lets the opponent go on from its own weights.
    """
    duels: list[PairedSteps] = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "vgg.safetensors"
        save_file(random_lpips("vgg"), weights)
        recipe = quick(recipe, "stage1", steps + 1)
        recipe = recipe.model_copy(update={"stage1": paper_losses(recipe.stage1, weights)})
        settings = recipe.stage1
        for repeat in range(repeats):
            run = Upgrade(recipe, Path(scratch) / f"run-{repeat}", lambda progress: None)
            task, rival = run.stage1_task(), run.stage1_task()
            critic, perceptual = rival.trainer.discriminator, rival.trainer.perceptual
            assert critic is not None
            assert perceptual is not None
            # the package's own forward pass: what one would first write
            opponent = PlainStage1(settings, rival.vae, cast(Lpips, perceptual).model, critic)

            def play(turn: Turn, opponent: PlainStage1 = opponent) -> Callable[[], float]:
                lr = learning_rate(settings, settings.lr, turn.step)
                images = turn.batch["images"].to(opponent.vae.device, memory_format=torch.channels_last)
                return partial(opponent.step, images, turn.step, lr, turn.draws.restarted)

            def copy(task: Stage1Task = task, rival: Stage1Task = rival) -> None:
                copy_weights(task.vae, rival.vae)
                copy_weights(
                    cast(nn.Module, task.trainer.discriminator), cast(nn.Module, rival.trainer.discriminator)
                )

            duels.append(PairedSteps(StepRecorder(task), play, copy if follow else lambda: None, run.accelerator))
            Trainer(task, recipe.run, run.folder, run.accelerator, duels[-1]).fit()
            duels[-1].end(run.folder.path)
            run.folder.close()
    return {"recipe": recipe.name, "precision": recipe.run.mixed_precision, **result(duels, settings.batch_size)}


class Indexed:
    """A dataset that notes which items it gave."""

    def __init__(self, dataset: Any):
        self.dataset, self.given, self.groups = dataset, [], dataset.groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        self.given.append(item[0])
        return self.dataset[item]


class LivePrompts:
    """Prompts embedded when they are asked for, in place of the cache."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        return embed_captions(self.pipeline, captions, type(denoiser(self.pipeline)).__name__)


def bench_stage2(recipe: Recipe, *, steps: int, repeats: int) -> dict[str, Any]:
    """Compare the trainer's stage 2 with `PlainStage2` on a float32 cache, and return figures.

    The detail VAE has trained for one step.
    """
    duels: list[PairedSteps] = []
    recipe = quick(quick(recipe, "stage1", 1), "stage2", steps + 1)
    settings = recipe.stage2.model_copy(
        update={"new_weight_lr_multiplier": 1.0, "warmup_steps": 0, "min_snr_gamma": None}
    )
    cache = recipe.cache.model_copy(update={"variants": 1, "dtype": "float32"})
    data = recipe.data.model_copy(update={"flip": False})
    recipe = recipe.model_copy(update={"stage2": settings, "cache": cache, "data": data})
    with tempfile.TemporaryDirectory() as scratch:
        first = Upgrade(recipe, Path(scratch) / "first", lambda progress: None)
        prediction = first.objective.prediction
        if prediction != "flow":
            raise RecipeError(
                f"base.model: {recipe.base.name} predicts {prediction}; the plain implementation knows flow "
                "matching alone"
            )
        first.train_vae()
        first.cache_latents()
        first.folder.close()
        for repeat in range(repeats):
            run = Upgrade(recipe, Path(scratch) / f"run-{repeat}", lambda progress: None, stage1=first.out)
            task, rival = run.stage2_task(), run.stage2_task()
            noted = Indexed(task.dataset)
            task.dataset = cast(Any, noted)
            opponent, pictures = plain_stage2(run, rival), run.data.for_cache()

            def play(
                turn: Turn, opponent: PlainStage2 = opponent, noted: Indexed = noted, pictures: Any = pictures
            ) -> Callable[[], float]:
                given = noted.given[-settings.batch_size :]  # nothing is read ahead without workers
                images = torch.stack([pictures[(i, i)]["image"] for i in given]).to(opponent.vae.device)
                lr = learning_rate(settings, settings.lr, turn.step)
                return partial(opponent.step, images, turn.batch["conditions"], turn.step, lr, turn.draws)

            def copy(task: Stage2Task = task, rival: Stage2Task = rival) -> None:
                copy_weights(task.transformer, rival.transformer)

            duels.append(PairedSteps(StepRecorder(task), play, copy, run.accelerator))
            Trainer(task, recipe.run, run.folder, run.accelerator, duels[-1]).fit()
            duels[-1].end(run.folder.path)
            run.folder.close()
    return {"recipe": recipe.name, "precision": recipe.run.mixed_precision, **result(duels, settings.batch_size)}


def plain_stage2(run: Upgrade, rival: Any) -> PlainStage2:
    """Return the plain opponent on the weights of a fresh stage 2."""
    settings, conditioning = run.recipe.stage2, rival.conditioning
    conditioning.cache = LivePrompts(run.base_pipeline)

    def draw(latents: Tensor, captions: list[str], draws: SampleRandom) -> tuple[list[str], Tensor, Tensor]:
        dropped = draws.uniform() < settings.caption_dropout
        t = torch.cat(
            [
                sample_timesteps(
                    1, one, mean=settings.timestep_mean, std=settings.timestep_std, shift=settings.timestep_shift
                )
                for one in draws.samples
            ]
        )
        noise = draws.normal(*latents.shape[1:])
        conditioning.draw(draws.batch)
        conditions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        return conditions, t.to(latents.device), noise.to(latents.device)

    return PlainStage2(settings, run.layout, run.vae(), rival.transformer, conditioning.predict, draw)
