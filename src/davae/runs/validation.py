"""What a run shows of itself on the way: losses on held-out pictures, and grids of pictures at a fixed seed."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from davae.cost.flops import meta_detail_vae
from davae.data.images import collate, grid, to_images
from davae.dataset.encoding import Encoder, coding_bytes, images_at_a_time, run_precision
from davae.errors import RecipeError
from davae.files.atomic import atomic_file
from davae.losses.ddpm import Diffusion
from davae.losses.flow_matching import FlowMatching, shift_timestep
from davae.losses.velocity import velocity_loss
from davae.pretrained.memory_budget import Halving
from davae.tasks.conditioning import Conditioning, EmbeddedInStep
from davae.tasks.noising import drop_conditions, noise_batch
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.distributed import from_main, is_main
from davae.train.loop import Periodic
from davae.train.random import SampleRandom
from davae.train.run_folder import BEST

if TYPE_CHECKING:
    from davae.dataset.opened import OpenedData
    from davae.runs.upgrade import Upgrade

logger = logging.getLogger(__name__)

SHOWN = 8  # pictures in a grid


class CaptionParts:
    """Embeddings of a few captions, computed once: what held-out pictures and shown prompts need of the text encoders."""

    def __init__(self, captions: list[str], parts: tuple[Tensor, ...]):
        self.number = {caption: place for place, caption in enumerate(captions)}
        self.parts = tuple(part.cpu() for part in parts)

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        rows = torch.tensor([self.number[caption] for caption in captions])
        return tuple(part[rows].float() for part in self.parts)


def write_grid(rows: list[list[Image.Image]], path: Path) -> None:
    """Rows of equally large pictures, as one PNG; only the first process writes."""
    if not is_main():
        return
    sheet = grid([picture for row in rows for picture in row], len(rows[0]), gap=0)
    with atomic_file(path) as partial:
        sheet.save(partial)


def plain_pictures(run: Upgrade, opened: OpenedData, count: int) -> dict[str, Any]:
    """Return held-out images (training images where nothing is held out) that fill the square, plain, as one batch.

    Raises:
        RecipeError: there are none.
    """
    chosen = opened.shown(count)
    if not chosen:
        raise RecipeError(
            f"run.sample_every and stage2.validate_every show square pictures, and none fills {run.recipe.resolution} x "
            f"{run.recipe.resolution} pixels; set both to 0, or give larger pictures"
        )
    pictures = opened.squares(chosen, run.recipe.run.seed)
    return collate([pictures[(place, -1)] for place in range(len(pictures))])


def stage1_pictures(run: Upgrade, task: Stage1Task) -> list[Periodic]:
    """Reconstructions of held-out pictures below the originals, every `run.sample_every` steps."""
    every = run.recipe.run.sample_every
    if not every:
        return []
    images = plain_pictures(run, run.data.stage1, SHOWN)["images"].to(run.accelerator.device)
    size = shown_at_a_time(run)

    @torch.no_grad()
    def show(step: int) -> dict[str, float]:
        side, parts = images.shape[-1] // task.vae.spatial_factor, []
        for part in images.split(size):
            noise = part.new_zeros(len(part), task.vae.layout.detail_channels, side, side)
            parts.append(task.modules["vae"](part, noise, torch.ones(len(part)))[0])
        reconstruction = torch.cat(parts)
        write_grid([to_images(images), to_images(reconstruction)], run.out / "progress" / f"stage1-{step:08d}.png")
        return {}

    return [Periodic(every, show)]


def shown_at_a_time(run: Upgrade) -> int:
    """Images that progress and validation code at a time: `report.batch_size`, else what the memory plan allows."""
    recipe, shapes, layout = run.recipe, run.base.shapes, run.layout

    def one() -> int:
        vae = meta_detail_vae(shapes, layout.detail_channels, layout.scale)
        return coding_bytes(vae, recipe.resolution, run_precision(recipe.run))

    chosen = images_at_a_time(recipe.report.batch_size, SHOWN, run.accelerator.device, one)
    return from_main(chosen)  # all processes run the wrapped model as often


def embedded_captions(run: Any, conditioning: Any, captions: list[str]) -> CaptionParts:
    """Return embeddings of captions; one that is not finite is named and replaced by the empty caption's, as in training.

    Text encoders that training has loaded for its own captions embed these too.
    """
    known, size = conditioning.cache, run.recipe.cache.batch_size
    embedded = known if isinstance(known, EmbeddedInStep) else EmbeddedInStep(run.embedder())
    parts = [embedded.embed(captions[first : first + size]) for first in range(0, len(captions), size)]
    return CaptionParts(captions, tuple(torch.cat(kind) for kind in zip(*parts, strict=True)))


def stage2_pictures(run: Upgrade, task: Stage2Task) -> list[Periodic]:
    """Loss on held-out pictures and pictures of the recipe's prompts, as often as the recipe wants them.

    The loss is that of the base's own objective with w(n) = 1, no min-SNR weights and no dropped conditions.
    """
    recipe, periodic = run.recipe, []
    if not (recipe.stage2.validate_every or recipe.run.sample_every):
        return []
    held_out = plain_pictures(run, run.opened, recipe.stage2.validate_pictures)
    if recipe.stage2.validate_every and run.opened.shown_from == "training":
        logger.warning(
            "stage2.validate_every: no images are held out (data.holdout), so the validation loss is of training images; it "
            "does not show overfitting"
        )
    prompts: list[Any] = list(recipe.sampling.prompts)[:SHOWN]
    conditioning = copy.copy(task.conditioning)
    if run.base.family.condition == "text":
        prompts = prompts or held_out["captions"][:SHOWN]
        captions = sorted({"", *held_out["captions"], *prompts})
        conditioning.cache = embedded_captions(run, task.conditioning, captions)  # type: ignore[attr-defined]
        conditions: list[Any] = held_out["captions"]
    else:
        conditions = held_out["labels"]
        prompts = list(range(min(SHOWN, conditioning.null)))
    vae, device = run.vae(), run.accelerator.device
    if recipe.stage2.validate_every:
        encoder = Encoder(
            vae, run_precision(recipe.run), recipe.report.batch_size or recipe.cache.batch_size, "validation"
        )
        with torch.no_grad():
            latents = vae.normalise(encoder(held_out["images"]))  # (N,C+D,h,w)

        @torch.no_grad()
        def validate(step: int) -> dict[str, float]:
            sums, size = torch.zeros(3, dtype=torch.float64), recipe.cache.batch_size
            for first in range(0, len(latents), size):
                part = latents[first : first + size]
                draws = SampleRandom(recipe.run.seed, "validation", 0, first, len(part))  # the same at every step
                given = drop_conditions(conditions[first : first + size], conditioning.null, 0.0, draws)
                noised = noise_batch(task.objective, part, draws)
                prediction = conditioning.predict(task.modules["transformer"], noised.x_t, noised.t, given)
                loss = velocity_loss(prediction, noised.target, task.layout, 1.0)
                found = [float(value) for value in (loss.total, loss.base, loss.detail)]
                sums += len(part) * torch.tensor(found, dtype=torch.float64)
            total, base, detail = (sums / len(latents)).tolist()
            return {BEST: total, "validation_base": base, "validation_detail": detail}

        periodic.append(Periodic(recipe.stage2.validate_every, validate))
    if recipe.run.sample_every:
        side = recipe.base.resolution // run.base.shapes.vae_factor
        decoding = Halving("progress", shown_at_a_time(run))
        draws = SampleRandom(recipe.sampling.seed, "samples", 0, 0, len(prompts))
        noise = draws.normal(task.layout.channels, side, side).to(device)

        @torch.no_grad()
        def sample(step: int) -> dict[str, float]:
            shown, scale = guided(conditioning, recipe.sampling.guidance_scale)
            latents = solve(shown, task, noise, prompts, recipe.sampling.steps, scale)
            pictures = to_images(decoding(lambda part: vae.decode(part, return_dict=False)[0], latents))
            write_grid([pictures], run.out / "progress" / f"stage2-{step:08d}.png")
            return {}

        periodic.append(Periodic(recipe.run.sample_every, sample))
    return periodic


def guided(conditioning: Conditioning, guidance_scale: float) -> tuple[Conditioning, float]:
    """Return the conditioning and the scale of two-pass guidance by which a model is guided once.

    Where guidance is an input of the model it gets the scale there, and a second pass would guide again.
    """
    embedded = conditioning.guided_by(guidance_scale)
    return (conditioning, guidance_scale) if embedded is None else (embedded, 1.0)


def solve(
    conditioning: Any, task: Stage2Task, noise: Tensor, conditions: list[Any], steps: int, guidance_scale: float
) -> Tensor:
    """From noise to normalised latents, (B,c,h,w), guided. Runs the wrapped model, so that every process takes part.

    Flow matching: Euler from t = 1 to 0 in equal steps of the shifted time. Diffusion: DDIM (arXiv 2010.02502) on the base's
    own table of noise levels, whatever solver its pipeline draws with.
    """

    def predict(x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), time, device=x.device)
        prediction = conditioning.predict(task.modules["transformer"], x, t, conditions)
        if guidance_scale == 1:
            return prediction
        free = conditioning.predict(task.modules["transformer"], x, t, [conditioning.null] * len(x))
        return free + guidance_scale * (prediction - free)

    x = noise
    if isinstance(task.objective, Diffusion):
        solver = ddim(task.objective)
        solver.set_timesteps(steps)
        for now in solver.timesteps:
            x = solver.step(predict(x, int(now)), int(now), x, return_dict=False)[0]
        return x
    assert isinstance(task.objective, FlowMatching)
    times = shift_timestep(torch.linspace(1, 0, steps + 1), task.objective.shift).tolist()
    for now, following in itertools.pairwise(times):
        x = x + (following - now) * predict(x, now)
    return x


def ddim(objective: Diffusion) -> DDIMScheduler:
    """A solver on the objective's table, from its last timestep on."""
    alpha_bar = objective.alphas_cumprod.cpu().double()
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.numpy(),
        prediction_type=objective.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
