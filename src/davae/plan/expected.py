"""Time and disk that an upgrade is expected to take on this machine, before it begins."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from davae.backbones.trainable import choose_trainable
from davae.cost.flops import autoencoder_flops, count, transformer_flops
from davae.latent import LatentLayout
from davae.plan.figures import MetaUpgrade
from davae.pretrained.shapes import BaseShapes
from davae.recipes import Recipe
from davae.recipes.hardware import UTILISATION
from davae.recipes.sections import Optim, Run
from davae.recipes.stages import POLISH

SHORT = 100  # steps; a training of fewer is over before an estimate of it is worth its seconds


@dataclass(frozen=True)
class Expected:
    """Estimates of a whole upgrade.

    Attributes:
        seconds: of each training, by name.
        disk: bytes that the run folder grows by, without the latent cache.
    """

    seconds: dict[str, float]
    disk: int


def is_short(recipe: Recipe) -> bool:
    """Return whether all trainings are too short for an estimate to be worth its time."""
    return max(settings.max_steps for settings in recipe.trainings.values()) < SHORT


def expect(recipe: Recipe, shapes: BaseShapes, speed: float, tokens: int | None = None) -> Expected:
    """Return the time and disk that an upgrade is expected to take.

    Args:
        speed: FLOPs a second of all devices together.
        tokens: of a prompt, see `short_prompt`.
    """
    layout = LatentLayout(shapes.channels, recipe.detail_channels, recipe.scale)
    upgrade = MetaUpgrade(shapes, layout, recipe.stage2.detail_offset)
    vae, transformer, side = upgrade.detail_vae, upgrade.expanded, recipe.base.resolution // shapes.vae_factor
    with torch.device("meta"):
        trained = count(choose_trainable(transformer, recipe.stage2.lora))
    own = vae.num_parameters(only_trainable=True)
    work = {"stage2": 3 * transformer_flops(transformer, side, tokens).total}
    for name, passes in (("stage1", 3), (POLISH, 1)):  # of the encoder; a polish takes no gradient of it
        if name in recipe.trainings:
            encode, decode = (flops.total for flops in autoencoder_flops(vae, recipe.seen_pixels(name)))
            work[name] = passes * encode + 3 * decode
    seconds = {name: training_seconds(one, work[name], speed) for name, one in recipe.trainings.items()}
    parameters = {"stage1": own, POLISH: count(vae.decoder.parameters()), "stage2": trained}
    autoencoders = 1 if recipe.stage1.polish is None else 2
    whole = 4 * (autoencoders * vae.num_parameters() + transformer.num_parameters())
    kept = sum(checkpoint_bytes(one, recipe.run, parameters[name]) for name, one in recipe.trainings.items())
    return Expected(seconds, kept + whole + 4 * trained)


def training_seconds(settings: Optim, flops: float, speed: float) -> float:
    """Return the time of a training.

    Args:
        flops: of one image, forward and backward; a backward pass takes as many as two forward ones.
    """
    return flops * settings.batch_size * settings.accumulation * settings.max_steps / speed


def checkpoint_bytes(settings: Optim, run: Run, trained: int) -> int:
    """Return the most bytes of a stage's checkpoints: weights, two moments and the average."""
    return checkpoint_files(settings, run) * 4 * trained * (3 + bool(settings.ema_decay))


def checkpoint_files(settings: Optim, run: Run) -> int:
    """Return the most checkpoints that a stage keeps at a time."""
    files = run.keep_checkpoints + 2  # one is written before another goes, and the best one stays
    return files + (settings.max_steps // run.keep_every if run.keep_every else 0)


def measured_speed(device: torch.device, precision: torch.dtype, processes: int = 1) -> float:
    """Return the FLOPs a second that training reaches, from a matrix product measured now.

    The share is an assumption; convolutions of small models reach less on a CPU.
    """
    side = 4096 if device.type == "cuda" else 512
    left, right = (torch.ones(side, side, device=device, dtype=precision) for _ in range(2))
    started, fastest, times = time.perf_counter(), math.inf, 0
    while times < 4 or (time.perf_counter() - started < 0.2 and times < 1000):
        begun = time.perf_counter()
        left @ right
        _wait(device)
        fastest = min(fastest, time.perf_counter() - begun)  # the first ones start libraries and clocks
        times += 1
    return UTILISATION * processes * 2 * side**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
