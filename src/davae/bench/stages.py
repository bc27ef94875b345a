"""`davae bench stage1` and `stage2`: the trainer's step against the plain implementation, on the same pictures and noise."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from davae.bench.clock import machine, ratio, spread
from davae.bench.plain import PlainStage1, PlainStage2
from davae.losses.flow_matching import sample_timesteps
from davae.losses.perceptual import random_lpips
from davae.models.pipeline import denoiser, embed_captions
from davae.recipes import RecipeError
from davae.recipes.schema import Recipe, Stage1
from davae.train.draws import Draws
from davae.train.loop import Progress, Trainer, learning_rate
from davae.train.upgrade import Upgrade


@dataclass
class Turn:
    """One step as the trainer saw it: its batch, and where its noise came from."""

    step: int
    batch: Any
    draws: Draws


@dataclass
class Recorder:
    """Stands before a task's first player and writes down what it was given."""

    task: Any
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loss, self._first = self.task.loss, next(iter(self.task.players))
        self.task.loss = self.loss

    def loss(self, player: str, batch: Any, step: int, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        if player == self._first:
            self.turns.append(Turn(step, batch, draws.afresh()))
        return self._loss(player, batch, step, draws)


@dataclass
class Watch:
    """Seconds and losses of a trainer's steps, from what it reports after each."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self.losses.append(progress.values["loss"])
        self._before = time.perf_counter()


def timed(works: list[Callable[[], float]]) -> tuple[list[float], list[float]]:
    """(seconds, results) of each."""
    seconds, results = [], []
    for work in works:
        started = time.perf_counter()
        results.append(work())
        seconds.append(time.perf_counter() - started)
    return seconds, results


def result(ours: list[float], plain: list[float], losses: list[tuple[float, float]], batch: int) -> dict[str, Any]:
    """Figures of one comparison. The first step of every repeat warms up and is left out by the caller."""
    fast, slow = spread(ours), spread(plain)
    return {
        "davae_seconds": fast.as_dict(),
        "plain_seconds": slow.as_dict(),
        "davae_images_per_second": batch / fast.median,
        "plain_images_per_second": batch / slow.median,
        "speedup": ratio(slow, fast),
        "largest_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
        "losses_compared": len(losses),
        "machine": machine(),
    }


def quick(recipe: Recipe, stage: str, steps: int) -> Recipe:
    """The recipe with one stage of so many steps, each of them logged."""
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
        }
    )


def bench_stage1(recipe: Recipe, *, steps: int, repeats: int) -> dict[str, Any]:
    """The trainer's stage 1 against `PlainStage1`, with the paper's losses on the recipe's model and pictures."""
    ours: list[float] = []
    plain: list[float] = []
    losses: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "vgg.safetensors"
        save_file(random_lpips("vgg"), weights)
        recipe = quick(recipe, "stage1", steps + 1)
        recipe = recipe.model_copy(update={"stage1": paper_losses(recipe.stage1, weights)})
        settings = recipe.stage1
        for repeat in range(repeats):
            run = Upgrade(recipe, Path(scratch) / f"run-{repeat}", lambda progress: None)
            task, rival = run.stage1_task(), run.stage1_task()
            recorder, watch = Recorder(task), Watch()
            Trainer(task, recipe.run, run.folder, run.accelerator, watch).fit()
            run.folder.close()
            critic, perceptual = rival.trainer.discriminator, rival.trainer.perceptual
            assert critic is not None
            assert perceptual is not None
            opponent = PlainStage1(settings, rival.vae, perceptual, critic)

            def turn(one: Turn, opponent: PlainStage1 = opponent) -> float:
                lr = learning_rate(settings, settings.lr, one.step)
                images = one.batch["images"].to(memory_format=torch.channels_last)
                return opponent.step(images, one.step, lr, one.draws.afresh)

            seconds, found = timed([lambda one=one: turn(one) for one in recorder.turns])
            ours += watch.seconds[1:]
            plain += seconds[1:]
            losses += zip(watch.losses, found, strict=True)
    return {"recipe": recipe.name, "batch": settings.batch_size, **result(ours, plain, losses, settings.batch_size)}


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
    """The trainer's stage 2 against `PlainStage2`, on a detail VAE that saw one step and a cache in float32."""
    ours: list[float] = []
    plain: list[float] = []
    losses: list[tuple[float, float]] = []
    recipe = quick(quick(recipe, "stage1", 1), "stage2", steps + 1)
    settings = recipe.stage2.model_copy(
        update={"new_weight_lr_multiplier": 1.0, "warmup_steps": 0, "min_snr_gamma": None}
    )
    cache = recipe.cache.model_copy(update={"variants": 1, "dtype": "float32"})
    data = recipe.data.model_copy(update={"flip": False})
    recipe = recipe.model_copy(update={"stage2": settings, "cache": cache, "data": data})
    with tempfile.TemporaryDirectory() as scratch:
        first = Upgrade(recipe, Path(scratch) / "first", lambda progress: None)
        if first.objective.prediction != "flow":
            raise RecipeError(
                f"base.model: {recipe.base.name} predicts {first.objective.prediction}; the plain implementation knows flow "
                "matching alone"
            )
        first.train_vae()
        first.cache_latents()
        first.folder.close()
        for repeat in range(repeats):
            run = Upgrade(recipe, Path(scratch) / f"run-{repeat}", lambda progress: None, stage1=first.out)
            task, rival = run.stage2_task(), run.stage2_task()
            recorder, watch = Recorder(task), Watch()
            noted = Indexed(task.dataset)
            task.dataset = cast(Any, noted)
            Trainer(task, recipe.run, run.folder, run.accelerator, watch).fit()
            run.folder.close()
            opponent = plain_stage2(run, rival)
            pictures = run.training_pictures()
            batch = settings.batch_size
            given = [noted.given[n * batch : (n + 1) * batch] for n in range(len(recorder.turns))]

            def turn(
                one: Turn, items: list[int], opponent: PlainStage2 = opponent, pictures: Any = pictures
            ) -> float:
                images = torch.stack([pictures[(i, i)]["image"] for i in items])
                lr = learning_rate(settings, settings.lr, one.step)
                return opponent.step(images, one.batch["conditions"], one.step, lr, one.draws)

            works = [
                lambda one=one, items=items: turn(one, items)
                for one, items in zip(recorder.turns, given, strict=True)
            ]
            seconds, found = timed(works)
            ours += watch.seconds[1:]
            plain += seconds[1:]
            losses += zip(watch.losses, found, strict=True)
    return {"recipe": recipe.name, "batch": settings.batch_size, **result(ours, plain, losses, settings.batch_size)}


def plain_stage2(run: Upgrade, rival: Any) -> PlainStage2:
    """The plain opponent on the weights of a fresh stage 2."""
    settings, conditioning = run.recipe.stage2, rival.conditioning
    conditioning.cache = LivePrompts(run.base)

    def draw(latents: Tensor, captions: list[str], draws: Draws) -> tuple[list[str], Tensor, Tensor]:
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
        return ["" if drop else text for text, drop in zip(captions, dropped, strict=True)], t, noise

    return PlainStage2(settings, run.layout, run.vae(), rival.transformer, conditioning.predict, draw)
