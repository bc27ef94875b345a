"""Validation on the way: losses on held-out images, grids of images at a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from davae.data.images import collate, grid, to_images
from davae.dataset.opened import OpenedData
from davae.errors import RecipeError
from davae.files.atomic import atomic_file
from davae.losses.clean_base import without_base_error
from davae.losses.velocity import velocity_loss
from davae.pretrained.memory_budget import Halving
from davae.recipes.sections import Sampling
from davae.tasks.conditioning import Conditioning, EmbeddedInStep
from davae.tasks.noising import drop_conditions
from davae.tasks.polish import PolishTask
from davae.tasks.solving import guided, solve
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.distributed import is_main
from davae.train.random import SampleRandom
from davae.train.run_folder import BEST
from davae.vae.detail_vae import DetailVAE

GRID_IMAGES = 8


class CaptionParts:
    """Embeddings of a few captions, computed once, for held-out images and shown prompts."""

    def __init__(self, captions: list[str], parts: tuple[Tensor, ...]):
        self.number = {caption: place for place, caption in enumerate(captions)}
        self.parts = tuple(part.cpu() for part in parts)

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        rows = torch.tensor([self.number[caption] for caption in captions])
        return tuple(part[rows].float() for part in self.parts)


def write_grid(rows: list[list[Image.Image]], path: Path) -> None:
    """Write rows of equally large images as one PNG, in the first process."""
    if not is_main():
        return
    sheet = grid([image for row in rows for image in row], len(rows[0]), gap=0)
    with atomic_file(path) as partial:
        sheet.save(partial)


def plain_images(opened: OpenedData, count: int, resolution: int, seed: int) -> dict[str, Any]:
    """Return held-out images, else training images, that fill the square, as one batch.

    Args:
        opened: the images of a stage.
        count: of images, at most.
        resolution: side of the square, pixels.
        seed: of the run.

    Raises:
        RecipeError: there are none.
    """
    chosen = opened.shown(count)
    if not chosen:
        raise RecipeError(
            f"run.sample_every and stage2.validate_every show square images, and none fills {resolution} x "
            f"{resolution} pixels; set both to 0, or give larger images"
        )
    images = opened.squares(chosen, seed)
    return collate([images[(place, -1)] for place in range(len(images))])


def embedded_captions(
    conditioning: Any,
    captions: list[str],
    embedder: Callable[[], Callable[[list[str]], tuple[Tensor, ...]]],
    size: int,
) -> CaptionParts:
    """Return embeddings of captions. As in training, one that is not finite is replaced.

    Args:
        conditioning: of the training. Text encoders that it has loaded embed these captions too.
        captions: distinct.
        embedder: makes captions -> embeddings where the training has loaded none.
        size: captions embedded at a time.
    """
    known = conditioning.cache
    embedded = known if isinstance(known, EmbeddedInStep) else EmbeddedInStep(embedder())
    parts = [embedded.embed(captions[first : first + size]) for first in range(0, len(captions), size)]
    return CaptionParts(captions, tuple(torch.cat(kind) for kind in zip(*parts, strict=True)))


def show_reconstructions(
    task: Stage1Task | PolishTask, images: Tensor, size: int, folder: Path
) -> Callable[[int], dict[str, float]]:
    """Return step -> writes images above their reconstructions to `TASK-STEP.png`.

    Args:
        task: trains the DetailVAE or its decoder.
        images: (N,3,sH,sW) in [-1,1], on the device.
        size: images coded at a time.
        folder: of the file.
    """

    @torch.no_grad()
    def show(step: int) -> dict[str, float]:
        decoded = torch.cat([task.reconstruct(part) for part in images.split(size)])
        write_grid([to_images(images), to_images(decoded)], folder / f"{task.name}-{step:08d}.png")
        return {}

    return show


def validation_loss(
    task: Stage2Task, conditioning: Conditioning, latents: Tensor, conditions: list[Any], size: int, seed: int
) -> Callable[[int], dict[str, float]]:
    """Return step -> the loss on held-out latents, with w(n) = 1 and no dropped conditions.

    Every step draws the same timesteps and noise.

    Args:
        task: trains the transformer.
        conditioning: knows the conditions.
        latents: normalised, (N,C+D,h,w).
        conditions: N prompts or classes.
        size: latents at a time.
        seed: of the run.
    """

    @torch.no_grad()
    def validate(step: int) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64)
        for first in range(0, len(latents), size):
            part = latents[first : first + size]
            draws = SampleRandom(seed, "validation", 0, first, len(part))
            given = drop_conditions(conditions[first : first + size], conditioning.null, 0.0, draws)
            noised = task.noise(part, draws)
            conditioning.draw(None)
            prediction = conditioning.predict(task.modules["transformer"], noised.x_t, noised.t, given)
            target = noised.target
            if noised.clean is not None:
                target = without_base_error(target, prediction, task.layout, noised.clean)
            loss = velocity_loss(prediction, target, task.layout, 1.0)
            known = 1.0 if noised.clean is None else float((~noised.clean).float().mean())  # share with a base error
            found = [float(value) for value in (loss.total, loss.base, loss.detail, known)]
            sums += len(part) * torch.tensor(found, dtype=torch.float64)
        total, base, detail, known = (sums / len(latents)).tolist()
        return {BEST: total, "validation_base": base / max(known, 1e-9), "validation_detail": detail}

    return validate


def show_samples(
    task: Stage2Task,
    conditioning: Conditioning,
    prompts: list[Any],
    vae: DetailVAE,
    decode: Halving,
    side: int,
    sampling: Sampling,
    folder: Path,
) -> Callable[[int], dict[str, float]]:
    """Return step -> writes samples of the prompts, from fixed noise, to `stage2-STEP.png`.

    Args:
        task: trains the transformer.
        conditioning: knows the prompts.
        prompts: or classes.
        vae: decodes the samples.
        decode: runs the decoder on as many latents as memory allows.
        side: of the latents.
        sampling: section of the recipe.
        folder: of the file.
    """
    draws = SampleRandom(sampling.seed, "samples", 0, 0, len(prompts))
    noise = draws.normal(task.layout.channels, side, side).to(task.device)

    @torch.no_grad()
    def show(step: int) -> dict[str, float]:
        shown, scale = guided(conditioning, sampling.guidance_scale)
        shown.draw(None)
        latents = solve(shown, task, noise, prompts, sampling.steps, scale)
        images = to_images(decode(lambda part: vae.decode(part, return_dict=False)[0], latents))
        write_grid([images], folder / f"stage2-{step:08d}.png")
        return {}

    return show
