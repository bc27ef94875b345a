"""Parts of an upgrade: recipe, base, images, run folder, and the models and tasks of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.backbones.expand import expand_transformer
from davae.backbones.head_options import HeadOptions, attach_head, set_skip_moments
from davae.cost.flops import meta_detail_vae
from davae.data.latent_cache.key import Key, hash_values
from davae.data.latent_cache.meta import CacheMeta, read_meta
from davae.data.latent_cache.moments import latent_moments
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.residual import DetailFit
from davae.dataset.encoding import coding_bytes, images_at_a_time, report_precision, run_precision
from davae.dataset.opened import OpenedData
from davae.dataset.stages import StageData
from davae.errors import DataError, RecipeError
from davae.files.atomic import model_folder
from davae.files.ownership import check_run
from davae.files.reading import read_object
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.prompting import embed_captions
from davae.publish.assemble import POLISHED, UPGRADE_FILE, load_trained
from davae.recipes import Recipe, load_recipe
from davae.recipes.stages import POLISH
from davae.runs.cache import cache_images, cache_key, cache_shards, check_shards, show_cache
from davae.runs.checks import check_named_files, check_objective, check_recipe, check_shared, taken_from
from davae.runs.frozen_features import frozen_features, held_base
from davae.runs.statistics import fit_residual, hash_statistics, set_residual, set_statistics
from davae.runs.validation import GRID_IMAGES
from davae.tasks.base_model import BaseModel
from davae.tasks.conditioning import conditioning, embed_in_step
from davae.tasks.polish import PolishTask
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.accelerator import make_accelerator, seed_initial_weights
from davae.train.distributed import from_main, is_main
from davae.train.locking import changing, hold_for_reading, one_at_a_time
from davae.train.loop import Observer, training_seed
from davae.train.run_folder import RunFolder, check_stage_inputs, is_done, trained_before, was_done
from davae.vae.detail_vae import DetailVAE
from davae.zoo import resolve_upgrade


def save_model(model: Any, folder: Path) -> None:
    """Write a diffusers model into a folder that appears whole or not at all."""
    with model_folder(folder) as partial:
        model.eval().save_pretrained(partial)


def polished_alike(one: Recipe, other: Recipe) -> bool:
    """Return whether two runs on one stage 1 polish it alike, on latents normalised alike."""
    read = attrgetter("stage1_data.source", "stage2.detail_residual", "stage2_data.source")
    return read(one) == read(other) and one.trainings.get(POLISH) == other.trainings.get(POLISH)


class UpgradeParts:
    """Everything that the steps of one upgrade work with.

    Args:
        recipe: of the upgrade.
        out: the run folder.
        observer: called after every step of a training.
        stage1: the folder of another run, equal up to stage 1, whose DetailVAE to use, and its cache where that is equal; a
            run that began with one goes on with it.

    Raises:
        RecipeError, DataError, ModelError, RunError: the recipe does not fit its base, images or the folder; found before a
            weight is read.
    """

    def __init__(self, recipe: Recipe, out: Path, observer: Observer, *, stage1: Path | None = None):
        check_run(out, partial(was_done, out))  # before any work
        stage1 = stage1 or taken_from(out, recipe.base.train is not None)
        self.origin = out if stage1 is None else stage1  # where the base and stage 1 are trained
        self.accelerator = make_accelerator(recipe.run, out)
        self.base = BaseModel.of(recipe, self.origin)
        self.layout = check_recipe(recipe, self.base)
        self.objective = check_objective(recipe, self.base)
        check_named_files(recipe, self.base.shapes, self.origin)  # before any work
        self.recipe, self.out = recipe, out
        self.data = StageData(recipe, self.base, out)
        if recipe.stage2.data is None:
            self.opened  # noqa: B018  # a fault in it is found before the folder is made
        self.init = None if recipe.init is None else resolve_upgrade(recipe.init)
        self.observer: Observer = observer if is_main() else lambda progress: None
        self.why_anew = "" if stage1 is None else check_shared(recipe, stage1)  # why it does not share the cache
        # where vae/ and cache/ lie; a run that has taken the autoencoder along keeps it
        self.first = out if from_main(self.why_anew or was_done(out, "stage1")) else self.origin
        self.shared = hold_for_reading(stage1) if stage1 is not None and is_main() else None
        self.folder = RunFolder(out, recipe)
        if recipe.stage2.data is None:
            self.data.summary  # noqa: B018

    @property
    def opened(self) -> OpenedData:
        """Return the images of the latent cache and stage 2."""
        return self.data.stage2

    @property
    def train(self) -> list[int]:
        """Return the places of the images on which stage 2 trains."""
        return self.opened.train

    @property
    def skipped(self) -> dict[str, str]:
        """Return the images of stage 2 that cannot be used, each with its reason."""
        return self.data.skipped

    @cached_property
    def base_pipeline(self) -> Any:
        """Return the whole pretrained pipeline, for the report, in main memory."""
        return self.base.load_pipeline(report_precision(self.recipe))

    def changing(self) -> AbstractContextManager[None]:
        """Keep other runs from using the autoencoder and cache of this folder while they are made."""
        return changing(self.out) if is_main() else nullcontext()

    def check_data(self) -> None:
        """Refuse images or latent shards from which stage 2 cannot learn."""
        if from_main(self.folder.done("cache")):
            return
        try:
            if self.recipe.cache.shards is None:
                self.data.check_conditions()
            else:
                side = self.recipe.base.resolution // self.base.shapes.vae_factor
                check_shards(self.recipe.cache, self.layout.channels, side, self.base.num_classes)
        except DataError:
            self.folder.close()
            raise

    # -- stage 1 -----------------------------------------------------------------------------------------------

    def new_vae(self) -> DetailVAE:
        """Return the DetailVAE as stage 1 starts it."""
        base_vae = self.base.load_vae()
        r = self.recipe
        return DetailVAE.from_base(base_vae, r.detail_channels, r.scale, r.downsample, r.stage1.start)

    def stage1_task(self) -> Stage1Task:
        """Return stage 1 at its first step."""
        recipe = self.recipe
        seed_initial_weights(training_seed(recipe.stage1, recipe.run))
        vae, images = self.new_vae(), self.data.for_stage1()
        return Stage1Task(recipe.stage1, vae, images, self.accelerator.device, frozen_features(self, vae))

    def vae(self) -> DetailVAE:
        """Return the trained DetailVAE, in eval mode."""
        return load_detail_vae(self.first / "vae").to(self.accelerator.device).eval()  # type: ignore[return-value]

    def measured_vae(self, scale: float = 1.0) -> DetailVAE:
        """Return the trained DetailVAE, which normalises its detail to a std of `scale`.

        The statistics are the cache's. `init` brings its own. Those of the DetailVAE on disk may be those of another stage 2
        on the same cache.
        """
        return self._measured(self.vae(), scale)

    def _measured(self, vae: DetailVAE, scale: float) -> DetailVAE:
        if self.init is None:
            set_statistics(vae, read_meta(self.first / "cache"), scale)
            if self.recipe.stage2.detail_residual:
                set_residual(vae, self.detail_fit, scale)
        return vae

    @cached_property
    def detail_fit(self) -> DetailFit:
        """The part of the cached detail that the base latent predicts, and what is left. Collective."""

        def fit() -> DetailFit:
            folder = self.first / "cache"
            cached = CachedLatents(folder, self.base.family.condition)
            return fit_residual(load_detail_vae(self.first / "vae"), cached, read_meta(folder))

        return from_main(fit() if is_main() else None)

    def _inputs(self, vae: DetailVAE, meta: CacheMeta) -> dict[str, str]:
        fitted = meta if self.init is None else None
        return {"the autoencoder": meta.key["autoencoder"], "its statistics": hash_statistics(vae, fitted)}

    def stage2_vae(self) -> DetailVAE:
        """Return the trained DetailVAE with the normalisation that stage 2 takes."""
        return self.measured_vae(self.recipe.stage2.detail_scale)

    def exported_vae(self) -> DetailVAE:
        """Return the DetailVAE of the pipeline, with the polished decoder where there is one."""
        if self.recipe.stage1.polish is None:
            return self.stage2_vae()
        polished: Any = load_detail_vae(self.out / POLISHED).to(self.accelerator.device)
        return self._measured(polished.eval(), self.recipe.stage2.detail_scale)

    def keep_statistics(self, vae: DetailVAE, folder: str) -> None:
        """Write a DetailVAE of stage 2 where that folder of the run has another or none."""
        file, settings = self.out / folder / "config.json", self.recipe.stage2
        there = read_object(file).get("detail_std") if file.is_file() else None
        own = settings.detail_scale != 1.0 or settings.detail_residual
        if there != list(vae.config["detail_std"] or []) and (there or own):
            save_model(vae, self.out / folder)

    def save_vae(self, vae: DetailVAE, folder: str = "vae") -> None:
        """Write the DetailVAE, with the size that its pipeline draws, into the run folder."""
        vae.register_to_config(resolution=self.recipe.resolution)
        save_model(vae, self.out / folder)

    def store_statistics(self, vae: DetailVAE, meta: CacheMeta) -> None:
        """Write the statistics of the cached detail latents into the DetailVAE's config."""
        set_statistics(vae, meta)
        save_model(vae, self.out / "vae")

    # -- polish ------------------------------------------------------------------------------------------------

    def polish_task(self) -> PolishTask:
        """Return the polish of the decoder at its first step.

        Where the autoencoder was made anew since its checkpoints, they are set aside.

        Raises:
            RunError: another run (`--stage1`) has made it anew since.
        """
        settings, vae, meta = self.recipe.stage1.polishing, self.measured_vae(), read_meta(self.first / "cache")
        inputs = self._inputs(vae, meta)
        if is_main():
            check_stage_inputs(self.folder, POLISH, inputs, self.first)
        if self.init is not None:  # whose detail may have a smaller std, and noise is in units of one
            mean, std = (torch.tensor(vae.config[f"detail_{name}"]) for name in ("mean", "std"))
            vae.set_detail_statistics(mean, std * self.recipe.stage2.detail_scale)
        seed_initial_weights(training_seed(settings, self.recipe.run))
        return PolishTask(settings, vae, self.data.for_stage1(), self.accelerator.device)

    def shared_polish(self) -> Path | None:
        """Return the folder of an equal polish that the shared run has finished, else None."""
        if self.origin == self.out:
            return None
        other = load_recipe(str(self.origin / "recipe.yaml"))
        same = isinstance(other, Recipe) and polished_alike(other, self.recipe)
        return self.origin / POLISHED if from_main(same and is_done(self.origin, self.recipe, POLISH)) else None

    # -- cache -------------------------------------------------------------------------------------------------

    def cache_key(self, vae: DetailVAE) -> Key:
        """Return what the content of the cache depends on."""
        recipe = self.recipe
        embeds_text = self.base.family.condition == "text" and recipe.cache.shards is None
        return cache_key(
            vae,
            self.opened,
            recipe.stage2_data,
            recipe.cache,
            resolution=recipe.resolution,
            seed=recipe.run.seed,
            text=recipe.base.model_dump(mode="json", exclude_defaults=True) if embeds_text else None,
        )

    def used_images(self, meta: CacheMeta) -> list[int]:
        """Return the training images that are in the cache."""
        return [index for index in self.train if self.opened.source.key(index) not in meta.skipped]

    def write_cache(self, vae: DetailVAE, folder: Path, key: Key) -> None:
        """Write the whole cache, from images or another extraction's shards of [z, z_d]."""
        recipe, watch = self.recipe, show_cache(self.observer)
        options: dict[str, Any] = {"key": key, "accelerator": self.accelerator, "watch": watch}
        if recipe.cache.shards is not None:
            cache_shards(
                folder, recipe.cache, channels=self.layout.channels, num_classes=self.base.num_classes, **options
            )
            return
        embeds = self.base.family.condition == "text" and recipe.cache.text == "stored"
        cache_images(
            folder, self.data.for_cache(), vae, cache=recipe.cache, precision=run_precision(recipe.run),
            num_workers=recipe.stage2_data.num_workers, embed=self.embedder() if embeds else None, **options,
        )  # fmt: skip

    def text_encoders(self) -> Any:
        """Return the pretrained pipeline without its transformer."""
        with one_at_a_time(self.out):
            return self.base.load_text_encoders(self.frozen).to(self.accelerator.device)

    @property
    def frozen(self) -> torch.dtype:
        """Return the precision of pretrained weights that are not trained."""
        return getattr(torch, self.recipe.base.dtype)

    def embedder(self) -> Callable[[list[str]], tuple[Tensor, ...]]:
        """Return captions -> embeddings, one tensor per kind. A first call loads the encoders."""
        encoders = cache(self.text_encoders)
        return lambda captions: embed_captions(encoders(), captions, self.base.shapes.transformer_class)

    # -- stage 2 -----------------------------------------------------------------------------------------------

    def check_precision(self) -> None:
        """Refuse half-precision base weights under FSDP2, which stage 2 cannot train there."""
        if self.recipe.stage2.lora is not None and self.frozen != torch.float32 and self.accelerator.is_fsdp2:
            fault = f"{self.recipe.base.dtype} weights cannot be cut into pieces with float32 ones"
            raise RecipeError(f"base.dtype: {fault}; set it to float32 under FSDP2, or use DDP")

    def stage2_task(self) -> Stage2Task:
        """Return stage 2 at its first step."""
        vae = self.stage2_vae()
        self.check_inputs(vae)
        seed_initial_weights(training_seed(self.recipe.stage2, self.recipe.run))
        frozen = torch.float32 if self.recipe.stage2.lora is None else self.frozen
        with one_at_a_time(self.out):
            task = self._stage2_task(vae, frozen, self.accelerator.device)
        if self.recipe.stage2.linear_skip and self.init is None:  # init brings the moments that it was trained with
            moments = from_main(latent_moments(task.dataset, vae.statistics) if is_main() else None)
            set_skip_moments(task.transformer, *moments)
        if self.recipe.cache.text == "step" and self.base.family.condition == "text":
            embed_in_step(task.conditioning, self.embedder())
        return task

    def _stage2_task(self, vae: DetailVAE, frozen: torch.dtype, device: torch.device) -> Stage2Task:
        """Expand the transformer (Eq. 7-11) and put it on the device."""
        pretrained, stage2 = self.base.load_transformer(frozen), self.recipe.stage2
        detail = self.recipe.detail_channels
        transformer = expand_transformer(pretrained, detail, stage2.new_weights, stage2.detail_offset)
        cache = CachedLatents(self.first / "cache", self.base.family.condition, embedded=True)
        given = conditioning(
            transformer, cache, device, null_text=self.base.silent_t5, pixel_factor=vae.spatial_factor,
            scheduler=self.base.scheduler, guidance=stage2.embedded_guidance,
        )  # fmt: skip
        held = held_base(self, transformer, given, vae.layout)
        attach_head(transformer, HeadOptions.of(stage2))
        task = Stage2Task(stage2, vae.layout, transformer, cache, vae.statistics, given, self.objective, device, held)
        if self.init is not None:
            load_trained(task.transformer, self.init / UPGRADE_FILE)
        return task

    def check_inputs(self, vae: DetailVAE) -> None:
        """Compare the DetailVAE and the cache with those on which stage 2 was begun.

        Where this run has made them anew, stage 2 begins again.

        Raises:
            DataError: the cache is not the DetailVAE's.
            RunError: another run (`--stage1`) has made them anew since.
        """
        meta = read_meta(self.first / "cache", self.cache_key(vae))
        inputs = self._inputs(vae, meta)
        inputs["the cache"] = hash_values(meta.key, meta.items, meta.mean)
        if is_main():
            check_stage_inputs(self.folder, "stage2", inputs, self.first)

    def only_export_is_due(self) -> bool:
        """Return whether stage 2 was trained on the same inputs before. Collective.

        Its step is then due because the decoder alone is new.
        """

        def trained() -> bool:
            return from_main((self.out / UPGRADE_FILE).is_file() and trained_before(self.out, self.recipe))

        if not trained():
            return False
        self.check_inputs(self.stage2_vae())  # takes the marker away where an input changed
        return trained()

    # -- progress ----------------------------------------------------------------------------------------------

    def coding_batch(self) -> int:
        """Return the images coded at a time: `report.batch_size`, else by the memory plan."""
        recipe, layout = self.recipe, self.layout

        def one() -> int:
            vae = meta_detail_vae(self.base.shapes, layout.detail_channels, layout.scale)
            return coding_bytes(vae, recipe.resolution, run_precision(recipe.run))

        chosen = images_at_a_time(recipe.report.batch_size, GRID_IMAGES, self.accelerator.device, one)
        return from_main(chosen)  # all processes run the wrapped model as often
