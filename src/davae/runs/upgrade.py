"""The way from a pretrained pipeline to an upgraded one: stage 1, latent cache, stage 2, export."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.backbones.expand import expand_transformer
from davae.data.latent_cache.key import Key, hash_values
from davae.data.latent_cache.meta import CacheMeta, is_whole, read_meta
from davae.data.latent_cache.read import CachedLatents
from davae.dataset.encoding import report_precision, run_precision
from davae.dataset.opened import OpenedData
from davae.dataset.stages import StageData
from davae.errors import DataError, RecipeError
from davae.files.atomic import model_folder
from davae.files.ownership import check_run
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.prompting import embed_captions
from davae.publish.assemble import UPGRADE_FILE, export_upgraded, load_trained
from davae.recipes import Recipe
from davae.runs.cache import cache_key, cache_pictures, cache_shards, write_skipped
from davae.runs.checks import check_init, check_objective, check_recipe, check_shared
from davae.runs.train_base import train_base
from davae.runs.validation import stage1_pictures, stage2_pictures
from davae.tasks.base_model import BaseModel
from davae.tasks.conditioning import conditioning, embed_in_step
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.accelerator import make_accelerator, seed_initial_weights
from davae.train.distributed import from_main, is_main, on_main
from davae.train.locking import changing, hold_for_reading, one_at_a_time
from davae.train.loop import Observer, Progress, Trainer, training_seed
from davae.train.run_folder import RunFolder, check_stage2_inputs, was_done
from davae.train.signals import check_stop, stop_on_signal
from davae.train.times import timed
from davae.vae.detail_vae import DetailVAE
from davae.zoo import resolve_upgrade

logger = logging.getLogger(__name__)


def save_model(model: Any, folder: Path) -> None:
    with model_folder(folder) as partial:
        model.eval().save_pretrained(partial)


class Upgrade:
    """One run of a recipe. Each step returns at once when it was finished before.

    Args:
        recipe: what to do.
        out: the run's folder.
        observer: told of every step.
        stage1: the folder of another run, equal up to the cache, whose DetailVAE and cache to use.
    """

    def __init__(self, recipe: Recipe, out: Path, observer: Observer, *, stage1: Path | None = None):
        check_run(out, partial(was_done, out))  # before any work
        self.first = out if stage1 is None else stage1  # where vae/ and cache/ lie
        self.accelerator = make_accelerator(recipe.run, out)
        self.base = BaseModel.of(recipe, self.first)
        self.layout = check_recipe(recipe, self.base)
        self.objective = check_objective(recipe, self.base)
        check_init(recipe, self.base.shapes)  # before any work
        self.recipe, self.out = recipe, out
        self.data = StageData(recipe, self.base, out)
        if recipe.stage2.data is None:
            self.opened  # noqa: B018  # a fault in it is found before the folder is made
        self.init = None if recipe.init is None else resolve_upgrade(recipe.init)
        self.observer: Observer = observer if is_main() else lambda progress: None
        if stage1 is not None:
            check_shared(recipe, stage1)
        self.shared = hold_for_reading(stage1) if stage1 is not None and is_main() else None
        self.folder = RunFolder(out, recipe)
        if recipe.stage2.data is None:
            self.data.summary  # noqa: B018

    @property
    def opened(self) -> OpenedData:
        """Images of the latent cache and stage 2."""
        return self.data.stage2

    @property
    def train(self) -> list[int]:
        """Images that stage 2 trains on."""
        return self.opened.train

    @property
    def held_out(self) -> list[int]:
        """Images that stage 2 does not train on and that fill the square."""
        return self.opened.held_out

    @property
    def skipped(self) -> dict[str, str]:
        """Images of stage 2 that cannot be used, and why."""
        return self.data.skipped

    @cached_property
    def base_pipeline(self) -> Any:
        """The whole pretrained pipeline in the report's precision, in main memory. Training loads what it needs."""
        return self.base.load_pipeline(report_precision(self.recipe))

    # -- base --------------------------------------------------------------------------------------------------

    def train_base_model(self) -> None:
        """The pretrained model, where the recipe has it trained here."""
        train = self.recipe.base.train
        if train is not None and self.folder.due("base"):
            train_base(train, self.out / "base", self.observer)
            self.folder.mark_done("base")

    # -- stage 1 -----------------------------------------------------------------------------------------------

    def train_vae(self) -> Path:
        """Stage 1; returns the folder of the DetailVAE. A recipe with `init` takes that upgrade's as it is."""
        target = self.first / "vae"
        if self.first != self.out:
            return target
        with changing(self.out) if is_main() and not self.folder.done("stage1") else nullcontext():
            return self._train_vae(target)

    def _train_vae(self, target: Path) -> Path:
        self.train_base_model()
        if self.init is not None and self.folder.due("stage1"):
            vae = load_detail_vae(self.init / "vae")
            if vae.layout != self.layout:
                raise RecipeError(f"init: {self.init} has {vae.layout}, this recipe {self.layout}")
            on_main(partial(self._save_vae, vae, target))
            self.folder.mark_done("stage1")
        if self.folder.due("stage1"):
            task = self.stage1_task()
            trainer = Trainer(
                task, self.recipe.run, self.folder, self.accelerator, self.observer, stage1_pictures(self, task)
            )
            trainer.fit(self.recipe.stage1_data.num_workers)
            trainer.use_average()
            trained = trainer.whole_state("vae")
            trainer.release()

            def save() -> None:  # into a new one: engines change the classes of what they train
                finished = self.new_vae()
                finished.load_state_dict(trained, strict=False)
                self._save_vae(finished, target)

            on_main(save)
            self.folder.mark_done("stage1")
        return target

    def _save_vae(self, vae: DetailVAE, target: Path) -> None:
        """Write it with the size that its pipeline is to draw."""
        vae.register_to_config(resolution=self.recipe.resolution)
        save_model(vae, target)

    def new_vae(self) -> DetailVAE:
        """The DetailVAE as stage 1 starts it."""
        base_vae = self.base.load_vae()
        r = self.recipe
        return DetailVAE.from_base(base_vae, r.detail_channels, r.scale, r.downsample, r.stage1.start)

    def stage1_task(self) -> Stage1Task:
        """Stage 1 at its first step."""
        recipe = self.recipe
        seed_initial_weights(training_seed(recipe.stage1, recipe.run))
        return Stage1Task(recipe.stage1, self.new_vae(), self.data.for_stage1(), self.accelerator.device)

    def vae(self) -> DetailVAE:
        return load_detail_vae(self.first / "vae").to(self.accelerator.device).eval()  # type: ignore[return-value]

    # -- cache -------------------------------------------------------------------------------------------------

    def cache_key(self, vae: DetailVAE) -> Key:
        recipe = self.recipe
        speaks = self.base.family.condition == "text" and recipe.cache.shards is None
        return cache_key(
            vae,
            self.opened,
            recipe.stage2_data,
            recipe.cache,
            resolution=recipe.resolution,
            seed=recipe.run.seed,
            text=recipe.base.model_dump(mode="json", exclude_defaults=True) if speaks else None,
        )

    def _watch(self, name: str) -> Callable[[int, int], None]:
        def watch(done: int, total: int) -> None:
            self.observer(Progress(name, done, total, 0.0))
            check_stop(f"the cache's {name}")

        return watch

    def cache_latents(self) -> Path:
        """Raw latents of the training set, detail statistics (written into the DetailVAE's config), and text.

        A cache that was interrupted goes on at its last whole shard; one of another key is made again.
        """
        target = self.first / "cache"
        if self.first == self.out and not from_main(self.folder.done("cache") and is_whole(target)):
            with changing(self.out) if is_main() else nullcontext(), timed(self.out, "cache"):
                vae = self.vae()
                key = self.cache_key(vae)
                self.write_cache(vae, target, key)
                meta = read_meta(target, key)
                if self.init is None:  # weights to go on from were trained on the statistics they came with
                    on_main(partial(self._store_statistics, vae, meta))
            if self.recipe.cache.shards is None:
                write_skipped(self.out / "pictures.json", len(self._used(meta)), self.skipped, self.accelerator)
            self.folder.mark_done("cache")
        return target

    def _used(self, meta: CacheMeta) -> list[int]:
        """Training pictures that stand in the cache."""
        return [index for index in self.train if self.opened.source.key(index) not in meta.skipped]

    def write_cache(self, vae: DetailVAE, folder: Path, key: Key) -> None:
        """The whole cache into a folder, from pictures or from another extraction's shards."""
        if self.recipe.cache.shards is None:
            self._cache_pictures(vae, folder, key)
        else:
            self._cache_shards(folder, key)

    def _cache_shards(self, folder: Path, key: Key) -> None:
        """Latents [z, z_d] that the official extraction wrote, instead of encoding pictures."""
        if self.base.family.classes_key is None:
            raise RecipeError("cache.shards: latent shards hold class labels; they train class-conditional models")
        cache_shards(
            folder,
            self.recipe.cache,
            channels=self.layout.channels,
            num_classes=int(self.base.shapes.transformer_config[self.base.family.classes_key]),
            key=key,
            accelerator=self.accelerator,
            watch=self._watch,
        )

    def _cache_pictures(self, vae: DetailVAE, folder: Path, key: Key) -> None:
        cache_pictures(
            folder,
            self.data.for_cache(),
            vae,
            key=key,
            cache=self.recipe.cache,
            precision=run_precision(self.recipe.run),
            num_workers=self.recipe.stage2_data.num_workers,
            accelerator=self.accelerator,
            watch=self._watch,
            embed=self.embedder()
            if self.base.family.condition == "text" and self.recipe.cache.text == "stored"
            else None,
        )

    def text_encoders(self) -> Any:
        """The pretrained pipeline without its transformer."""
        with one_at_a_time(self.out):
            return self.base.load_text_encoders(self.frozen).to(self.accelerator.device)

    @property
    def frozen(self) -> torch.dtype:
        """The precision of pretrained weights that are not trained."""
        return getattr(torch, self.recipe.base.dtype)

    def embedder(self) -> Callable[[list[str]], tuple[Tensor, ...]]:
        """Captions -> what the text encoders say of them, one tensor per kind; the encoders are loaded when first asked."""
        encoders = cache(self.text_encoders)
        return lambda captions: embed_captions(encoders(), captions, self.base.shapes.transformer_class)

    def _store_statistics(self, vae: DetailVAE, meta: CacheMeta) -> None:
        mean, std = torch.tensor(meta.mean).view(1, -1, 1, 1), torch.tensor(meta.std).view(1, -1, 1, 1)
        vae.set_detail_statistics(vae.layout.split(mean)[1].flatten(), vae.layout.split(std)[1].flatten())
        save_model(vae, self.out / "vae")

    # -- stage 2 -----------------------------------------------------------------------------------------------

    def stage2_task(self) -> Stage2Task:
        vae = self.vae()
        self.check_inputs(vae)
        seed_initial_weights(training_seed(self.recipe.stage2, self.recipe.run))
        frozen = torch.float32 if self.recipe.stage2.lora is None else self.frozen
        if frozen != torch.float32 and self.accelerator.is_fsdp2:
            raise RecipeError(
                f"base.dtype: {self.recipe.base.dtype} weights cannot be cut into pieces with float32 ones; set it to "
                "float32 under FSDP2, or use DDP"
            )
        with one_at_a_time(self.out):
            task = self._stage2_task(vae, frozen, self.accelerator.device)
        if self.recipe.cache.text == "step" and self.base.family.condition == "text":
            embed_in_step(task.conditioning, self.embedder())
        return task

    def _stage2_task(self, vae: DetailVAE, frozen: torch.dtype, device: torch.device) -> Stage2Task:
        """Stage 2 at its first step; its transformer is on the device."""
        pretrained = self.base.load_transformer(frozen)
        transformer = expand_transformer(pretrained, self.recipe.detail_channels, self.recipe.stage2.new_weights)
        cache = CachedLatents(self.first / "cache", self.base.family.condition, embedded=True)
        task = Stage2Task(
            self.recipe.stage2,
            vae.layout,
            transformer,
            cache,
            vae.statistics,
            conditioning(
                transformer,
                cache,
                device,
                null_text=self.base.silent_t5,
                pixel_factor=vae.spatial_factor,
                scheduler=self.base.scheduler,
                guidance=self.recipe.stage2.embedded_guidance,
            ),
            self.objective,
            device,
        )
        if self.init is not None:
            load_trained(task.transformer, self.init / UPGRADE_FILE)
        return task

    def check_inputs(self, vae: DetailVAE) -> None:
        """Compare the DetailVAE and the cache with those that stage 2 was begun with.

        Where this run has made them anew, stage 2 begins again.

        Raises:
            DataError: the cache is not the DetailVAE's.
            RunError: another run (`--stage1`) has made them anew since.
        """
        meta = read_meta(self.first / "cache", self.cache_key(vae))
        statistics = [hash_values(getattr(vae, name).flatten().tolist()) for name in ("mean", "std")]
        inputs = {"the autoencoder": meta.key["autoencoder"], "its statistics": hash_values(statistics)}
        inputs["the cache"] = hash_values(meta.key, meta.items, meta.mean)
        if is_main():
            check_stage2_inputs(self.folder, inputs, self.first)

    def train_dit(self) -> Path:
        """Stage 2 and the export; returns the pipeline's folder."""
        target = self.out / "pipeline"
        if self.folder.due("stage2"):
            task = self.stage2_task()
            recipe = self.recipe
            trainer = Trainer(
                task, recipe.run, self.folder, self.accelerator, self.observer, stage2_pictures(self, task)
            )
            trainer.fit(recipe.stage2_data.num_workers)
            trainer.use_average()
            state = trainer.whole_state("transformer")
            tensors = {name: state[name] for name in task.trainables["transformer"].trained}
            trainer.release()

            def export() -> None:
                vae = load_detail_vae(self.first / "vae")
                self.check_inputs(vae)
                export_upgraded(self.base.name, vae, tensors, recipe, self.out / UPGRADE_FILE, target)

            on_main(export)
            self.folder.mark_done("stage2")
        return target

    def check_data(self) -> None:
        """Refuse images that the steps ahead cannot learn from, before anything is trained.

        Raises:
            DataError: captions that are mostly empty or the same; the folder then takes a corrected recipe.
        """
        if from_main(self.folder.done("cache")):
            return
        try:
            self.data.check_captions()
        except DataError:
            self.folder.forget()
            raise

    def run(self) -> Path:
        """Every step in order."""
        with stop_on_signal(self.recipe.run.stop_signals):
            self.train_vae()
            self.cache_latents()
            target = self.train_dit()
            check_stop(f"{self.out}: stage 2 and its export")
        return target
