"""The way from a pretrained pipeline to an upgraded one (Fig. 2): see `UPGRADE_STEPS`.

`davae.runs.report` draws, measures and writes the page of a finished run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.backbones.head_options import BUFFERS
from davae.data.latent_cache.meta import is_whole, read_meta
from davae.dataset.encoding import Encoder, run_precision
from davae.errors import RecipeError
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.memory_budget import Halving
from davae.publish.assemble import POLISHED, UPGRADE_FILE, export_upgraded, read_upgrade
from davae.publish.upgrade_file import upgrade_vae
from davae.recipes.stages import POLISH
from davae.runs.cache import write_skipped
from davae.runs.train_base import train_base
from davae.runs.upgrade_parts import UpgradeParts
from davae.runs.validation import (
    GRID_IMAGES,
    embedded_captions,
    plain_images,
    show_reconstructions,
    show_samples,
    validation_loss,
)
from davae.tasks.polish import PolishTask
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.distributed import from_main, on_main
from davae.train.locking import keep_origin
from davae.train.loop import Periodic, Trainer
from davae.train.signals import check_stop, stop_on_signal
from davae.train.times import timed
from davae.vae.detail_vae import DetailVAE

logger = logging.getLogger(__name__)


def pretrain_base(run: UpgradeParts) -> None:
    """Train the base model that the recipe's `base.train` describes."""
    assert run.recipe.base.train is not None
    with run.changing():
        train_base(run.recipe.base.train, run.out / "base", run.observer)


def train_detail_vae(run: UpgradeParts) -> None:
    """Train the DetailVAE (Eq. 3-6), or take that of `init` or of another run as it is."""
    with run.changing():
        given = None if run.init is None else upgrade_vae(run.init)
        if run.origin != run.out:
            text = "--stage1 %s: its autoencoder is taken along, and the cache is encoded anew (%s)"
            logger.info(text, run.origin, run.why_anew)
            given = run.origin / "vae"
        if given is not None:
            vae = load_detail_vae(given)
            if vae.layout != run.layout:
                raise RecipeError(f"init: {given} has {vae.layout}, this recipe {run.layout}")
            on_main(partial(run.save_vae, vae))
            return
        train_autoencoder(run, run.stage1_task(), run.new_vae, "vae")


def train_autoencoder(
    run: UpgradeParts, task: Stage1Task | PolishTask, start: Callable[[], DetailVAE], folder: str
) -> None:
    """Train a DetailVAE, or its decoder, and write it.

    Args:
        run: the parts of the run.
        task: at its first step.
        start: returns the DetailVAE that the task began with.
        folder: in the run folder.
    """
    trainer = Trainer(task, run.recipe.run, run.folder, run.accelerator, run.observer, stage1_progress(run, task))
    trainer.fit(run.recipe.stage1_data.num_workers)
    trainer.use_average()
    trained = trainer.whole_state("vae")
    trainer.release()

    def save() -> None:  # into a new one: engines change the classes of what they train
        finished = start()
        finished.load_state_dict(trained, strict=False)
        run.save_vae(finished, folder)

    on_main(save)


def write_latent_cache(run: UpgradeParts) -> None:
    """Write latents and text embeddings of the training set, and the detail statistics.

    A cache that was interrupted goes on at its last whole shard; one of another key is made again.
    """
    target = run.out / "cache"
    with run.changing(), timed(run.out, "cache"):
        key = run.cache_key(vae := run.vae())
        run.write_cache(vae, target, key)
        meta = read_meta(target, key)
        if run.init is None:  # weights to go on from were trained on the statistics they came with
            on_main(partial(run.store_statistics, vae, meta))
    if run.recipe.cache.shards is None:
        write_skipped(run.out / "pictures.json", len(run.used_images(meta)), run.skipped, run.accelerator)


def polish_decoder(run: UpgradeParts) -> None:
    """Train the decoder alone on noised latents, or take that of the shared run."""
    if (polished := run.shared_polish()) is not None:
        on_main(lambda: run.save_vae(load_detail_vae(polished), POLISHED))
        return
    train_autoencoder(run, run.polish_task(), run.measured_vae, POLISHED)


def train_transformer(run: UpgradeParts) -> None:
    """Train the expanded transformer (Eq. 7-13), then export upgrade file and pipeline.

    A run that was trained before, and whose decoder alone is new, is only exported.
    """
    if run.only_export_is_due():
        on_main(lambda: export_run(run, read_upgrade(run.out / UPGRADE_FILE)[1]))
        return
    task, recipe, vae = run.stage2_task(), run.recipe, run.stage2_vae()
    on_main(partial(run.keep_statistics, vae, "vae"))  # what shows checkpoints decodes with it
    trainer = Trainer(task, recipe.run, run.folder, run.accelerator, run.observer, stage2_progress(run, task))
    trainer.fit(recipe.stage2_data.num_workers)
    trainer.use_average()
    state = trainer.whole_state("transformer")
    trained = set(task.trainables["transformer"].trained)
    tensors = {name: value for name, value in state.items() if name in trained or name.startswith(BUFFERS)}
    trainer.release()
    on_main(lambda: export_run(run, tensors))


def export_run(run: UpgradeParts, trained: dict[str, Tensor]) -> None:
    """Write upgrade file and pipeline, in one process.

    Args:
        run: the parts of the run.
        trained: what stage 2 leaves, the `upgrade_tensors` by name.
    """
    run.check_inputs(run.stage2_vae())
    vae = run.exported_vae()
    run.keep_statistics(vae, "vae" if run.recipe.stage1.polish is None else POLISHED)
    export_upgraded(run.base.name, vae, trained, run.recipe, run.out / UPGRADE_FILE, run.out / "pipeline")


@dataclass(frozen=True)
class Step:
    """One step of an upgrade.

    Attributes:
        name: of its mark in the run folder, `checkpoints/NAME.done`.
        work: does the step.
        leaves: the folder in the run folder that it writes.
    """

    name: str
    work: Callable[[UpgradeParts], None]
    leaves: str


UPGRADE_STEPS = (
    # needs: base.train of the recipe and its images. leaves: a diffusers pipeline. Only where the base is trained here
    Step("base", pretrain_base, "base/pipeline"),
    # needs: the pretrained autoencoder and images. leaves: the detail-aligned VAE
    Step("stage1", train_detail_vae, "vae"),
    # needs: vae/, images, text encoders. leaves: latents, text embeddings, detail statistics in vae/config.json
    Step("cache", write_latent_cache, "cache"),
    # needs: vae/, images. leaves: the autoencoder with a decoder that forgives noise, for the export. Only with stage1.polish
    Step(POLISH, polish_decoder, POLISHED),
    # needs: vae/, cache/, the pretrained transformer. leaves: upgrade.safetensors and the upgraded pipeline
    Step("stage2", train_transformer, "pipeline"),
)
OWN_STEPS = (POLISH, "stage2")  # that are not another run's, whose stage 1 and cache may be shared


class Upgrade(UpgradeParts):
    """One run of a recipe: the steps over its parts. `UpgradeParts` lists arguments and errors."""

    def run(self, last: str = "stage2") -> Path:
        """Do every step that is not done, in order.

        Args:
            last: name of the last step.

        Returns:
            The folder that the last step leaves.

        Raises:
            Interrupted: after a signal; what is finished is saved.
        """
        if last == "stage2" and self.due("stage2"):
            self.check_precision()
        on_main(partial(keep_origin, self.out, self.origin))  # not before: a check may refuse the run
        with stop_on_signal(self.recipe.run.stop_signals):
            for step in UPGRADE_STEPS:
                if self.due(step.name):
                    step.work(self)
                    self.folder.mark_done(step.name)
                if step.name == last:
                    break
            check_stop(f"{self.out}: {step.name}")
        return (self.out if step.name in OWN_STEPS else self.first) / step.leaves

    def due(self, step: str) -> bool:
        """Return whether a step is still to be done, as the first process sees it. Collective."""
        if step == "base" and (self.recipe.base.train is None or self.origin != self.out):
            return False
        if step == POLISH and self.recipe.stage1.polish is None:
            return False
        if step not in OWN_STEPS and self.first != self.out:  # another run has done it
            return False
        return not from_main(self.folder.done(step) and (step != "cache" or is_whole(self.out / "cache")))

    def train_vae(self) -> Path:
        """Do the steps up to stage 1 and return the folder of the DetailVAE."""
        return self.run("stage1")

    def cache_latents(self) -> Path:
        """Do the steps up to the latent cache, refuse a stale one, and return its folder."""
        if not (self.due("stage1") or self.due("cache")):
            read_meta(self.first / "cache", self.cache_key(self.vae()))
        return self.run("cache")

    def train_dit(self) -> Path:
        """Do the steps up to stage 2 and its export and return the pipeline's folder."""
        return self.run("stage2")


# -- progress: what the two trainings validate and show ----------------------------------------------------------------


def stage1_progress(run: UpgradeParts, task: Stage1Task | PolishTask) -> list[Periodic]:
    """Return reconstructions of held-out images, every `run.sample_every` steps."""
    every, recipe = run.recipe.run.sample_every, run.recipe
    if not every:
        return []
    opened = run.data.stage1
    images = plain_images(opened, GRID_IMAGES, recipe.resolution, recipe.run.seed)["images"]
    images = images.to(run.accelerator.device)
    return [Periodic(every, show_reconstructions(task, images, run.coding_batch(), run.out / "progress"))]


def stage2_progress(run: UpgradeParts, task: Stage2Task) -> list[Periodic]:
    """Return validation and samples of stage 2, as often as the recipe has them."""
    recipe, periodic = run.recipe, []
    losses, samples = recipe.stage2.validate_every, recipe.run.sample_every
    if not (losses or samples):
        return []
    held_out = plain_images(run.opened, recipe.stage2.validate_pictures, recipe.resolution, recipe.run.seed)
    if losses and run.opened.shown_from == "training":
        logger.warning(
            "stage2.validate_every: no images are held out (data.holdout), so the validation loss is of training images; it "
            "does not show overfitting"
        )
    prompts: list[Any] = list(recipe.sampling.prompts)[:GRID_IMAGES]
    shown: Any = copy.copy(task.conditioning)
    if run.base.family.condition == "text":
        prompts = prompts or held_out["captions"][:GRID_IMAGES]
        captions = sorted({"", *held_out["captions"], *prompts})
        shown.cache = embedded_captions(task.conditioning, captions, run.embedder, recipe.cache.batch_size)
        conditions: list[Any] = held_out["captions"]
    else:
        conditions, prompts = held_out["labels"], list(range(min(GRID_IMAGES, shown.null)))
    vae = run.exported_vae()
    if losses:
        size = recipe.report.batch_size or recipe.cache.batch_size
        encoder = Encoder(vae, run_precision(recipe.run), size, "validation")
        with torch.no_grad():
            latents = vae.normalise(encoder(held_out["images"]))  # (N,C+D,h,w)
        validate = validation_loss(task, shown, latents, conditions, recipe.cache.batch_size, recipe.run.seed)
        periodic.append(Periodic(losses, validate))
    if samples:
        decode = Halving("progress", run.coding_batch())
        side = recipe.base.resolution // run.base.shapes.vae_factor
        show = show_samples(task, shown, prompts, vae, decode, side, recipe.sampling, run.out / "progress")
        periodic.append(Periodic(samples, show))
    return periodic
