"""The way from a pretrained pipeline to an upgraded one: stage 1, latent cache, stage 2, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data.cache import CachedLatents, CacheMeta, fingerprint, read_meta, write_latents, write_text
from davae.data.latent_shards import import_shards
from davae.data.pictures import Pictures
from davae.latent import LatentLayout
from davae.models.detail_vae import DetailVAE
from davae.models.expand import expand_transformer
from davae.models.families import transformer_family
from davae.models.pipeline import (
    BaseShapes,
    embed_captions,
    load_part,
    load_pipeline,
    read_shapes,
    reads_silent_t5,
)
from davae.recipes import RecipeError
from davae.recipes.schema import Recipe
from davae.train.base_run import planned_shapes, train_base
from davae.train.conditioning import conditioning
from davae.train.export import (
    UPGRADE_FILE,
    apply_upgrade,
    assemble,
    load_trained,
    read_metadata,
    save_pipeline,
    save_upgrade,
)
from davae.train.loop import Observer, Progress, Trainer, training_seed
from davae.train.progress import stage1_pictures, stage2_pictures
from davae.train.ranks import is_main, on_main
from davae.train.setup import make_accelerator, open_pictures, seed_initial_weights
from davae.train.stage1 import Stage1Task
from davae.train.stage2 import Stage2Task
from davae.train.state import RunFolder, new_folder
from davae.zoo import resolve, resolve_upgrade


def check_recipe(recipe: Recipe, shapes: BaseShapes) -> LatentLayout:
    """What a recipe can get wrong about its base model, before any weight is read.

    Raises:
        RecipeError: D not a multiple of C, or a size that does not divide, with the dotted path.
    """
    if recipe.detail_channels % shapes.channels:
        raise RecipeError(
            f"detail_channels: {recipe.detail_channels} is not a multiple of the {shapes.channels} latent channels of "
            f"{recipe.base.name}; use {shapes.channels * max(1, round(recipe.detail_channels / shapes.channels))}"
        )
    if recipe.scale & (recipe.scale - 1):
        raise RecipeError(f"scale: {recipe.scale} is not a power of two")
    step = shapes.vae_factor * shapes.patch_size
    if recipe.base.resolution % step:
        below = recipe.base.resolution // step * step
        raise RecipeError(
            f"base.resolution: {recipe.base.resolution} is not divisible by {step} (autoencoder factor "
            f"{shapes.vae_factor} x patch {shapes.patch_size}); use {below or step} or {below + step}"
        )
    return LatentLayout(shapes.channels, recipe.detail_channels, recipe.scale)


def save_model(model: Any, folder: Path) -> None:
    with new_folder(folder) as partial:
        model.eval().save_pretrained(partial)


def base_shapes(recipe: Recipe) -> BaseShapes:
    """Shapes of the recipe's base model, trained already or not."""
    if recipe.base.train is not None:
        return planned_shapes(recipe.base.train)
    assert recipe.base.model is not None
    return read_shapes(resolve(recipe.base.model))


class Upgrade:
    """One run of a recipe. Each step returns at once when it was finished before.

    Args:
        recipe: what to do.
        out: the run's folder.
        observer: told of every step.
        stage1: the folder of another run, equal up to the cache, whose DetailVAE and cache to use.
    """

    def __init__(self, recipe: Recipe, out: Path, observer: Observer, *, stage1: Path | None = None):
        self.first = out if stage1 is None else stage1  # where vae/ and cache/ lie
        self.accelerator = make_accelerator(recipe.run, out)
        if recipe.base.train is None:
            assert recipe.base.model is not None
            self.model = resolve(recipe.base.model)
        else:
            self.model = str(self.first / "base" / "pipeline")
        self.shapes = base_shapes(recipe)
        self.family = transformer_family(self.shapes.transformer_class)
        self.layout = check_recipe(recipe, self.shapes)
        self.source, self.train, self.held_out = open_pictures(recipe.data, recipe.resolution)
        self.init = None if recipe.init is None else resolve_upgrade(recipe.init)
        if self.init is not None:
            read_metadata(self.init / UPGRADE_FILE)  # a wrong folder is told now, not after the cache is written
        self.recipe, self.out = recipe, out
        self.observer: Observer = observer if is_main() else lambda progress: None
        if stage1 is not None:
            read_meta(stage1 / "cache", self._key())
        self.folder = RunFolder(out, recipe)
        self.skipped: dict[str, str] = {}  # unreadable pictures met so far, and why

    @cached_property
    def base(self) -> Any:
        """The whole pretrained pipeline, on the device: for pictures. Training steps load the parts that they need."""
        return load_pipeline(self.model).to(self.accelerator.device)

    def pictures(self, indices: list[int]) -> Pictures:
        recipe = self.recipe
        pictures = Pictures(self.source, indices, recipe.resolution, seed=recipe.run.seed, flip=recipe.data.flip)
        pictures.skipped = self.skipped
        return pictures

    # -- base --------------------------------------------------------------------------------------------------

    def train_base_model(self) -> None:
        """The pretrained model, where the recipe has it trained here."""
        train = self.recipe.base.train
        if train is not None and not self.folder.done("base"):
            train_base(train, self.out / "base", self.observer)
            self.folder.mark_done("base")

    # -- stage 1 -----------------------------------------------------------------------------------------------

    def train_vae(self) -> Path:
        """Stage 1; returns the folder of the DetailVAE. A recipe with `init` takes that upgrade's as it is."""
        target = self.first / "vae"
        if self.first != self.out:
            return target
        self.train_base_model()
        if self.init is not None and not self.folder.done("stage1"):
            vae = DetailVAE.from_pretrained(self.init / "vae", torch_dtype=torch.float32)
            if vae.layout != self.layout:
                raise RecipeError(f"init: {self.init} has {vae.layout}, this recipe {self.layout}")
            on_main(partial(save_model, vae, target))
            self.folder.mark_done("stage1")
        if not self.folder.done("stage1"):
            task = self.stage1_task()
            trainer = Trainer(
                task, self.recipe.run, self.folder, self.accelerator, self.observer, stage1_pictures(self, task)
            )
            trainer.fit(self.recipe.data.num_workers)
            trainer.use_average()
            trained = trainer.whole_state("vae")
            trainer.release()

            def save() -> None:  # into a new one: engines change the classes of what they train
                finished = self.new_vae()
                finished.load_state_dict(trained, strict=False)
                save_model(finished, target)

            on_main(save)
            self.folder.mark_done("stage1")
        return target

    def new_vae(self) -> DetailVAE:
        """The DetailVAE as stage 1 starts it."""
        base_vae = load_part(self.model, "vae", self.shapes.vae_class)
        return DetailVAE.from_base(base_vae, self.recipe.detail_channels, self.recipe.scale, self.recipe.downsample)

    def stage1_task(self) -> Stage1Task:
        """Stage 1 at its first step."""
        recipe = self.recipe
        seed_initial_weights(training_seed(recipe.stage1, recipe.run))
        return Stage1Task(recipe.stage1, self.new_vae(), self.pictures(self.train), self.accelerator.device)

    def vae(self) -> DetailVAE:
        return DetailVAE.from_pretrained(self.first / "vae").to(self.accelerator.device).eval()  # type: ignore[return-value]

    # -- cache -------------------------------------------------------------------------------------------------

    def _key(self) -> str:
        """Hash of all that vae/ and cache/ hang on. Defaults are left out, so that new options make no cache stale."""
        fields = {"base", "scale", "detail_channels", "downsample", "init", "data", "stage1", "cache"}
        values = self.recipe.model_dump(mode="json", exclude_defaults=True, include=fields)
        values.get("data", {}).pop("num_workers", None)
        return fingerprint(values, self.recipe.run.seed)

    def _watch(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.observer(Progress(name, done, total, 0.0))

    def cache_latents(self) -> Path:
        """Raw latents of the training set, detail statistics (written into the DetailVAE's config), and text."""
        target = self.first / "cache"
        if self.first == self.out and not self.folder.done("cache"):
            vae = self.vae()

            def write() -> None:
                with new_folder(target) as whole:
                    if self.recipe.cache.shards is None:
                        self._cache_pictures(vae, whole)
                    else:
                        self._cache_shards(whole)
                if self.init is None:  # weights to go on from were trained on the statistics they came with
                    self._store_statistics(vae, read_meta(target, self._key()))

            on_main(write)
            self.folder.mark_done("cache")
        return target

    def _cache_shards(self, folder: Path) -> None:
        """Latents [z, z_d] that the official extraction wrote, instead of encoding pictures."""
        if self.family.condition != "class":
            raise RecipeError("cache.shards: latent shards hold class labels; they train class-conditional models")
        assert self.recipe.cache.shards is not None
        import_shards(
            Path(self.recipe.cache.shards),
            folder,
            channels=self.layout.channels,
            num_classes=int(self.shapes.transformer_config["num_classes"]),
            key=self._key(),
            dtype=self.recipe.cache.dtype,
            on_batch=self._watch("latents"),
        )

    def _cache_pictures(self, vae: DetailVAE, folder: Path) -> None:
        recipe = self.recipe

        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            raw = vae.encode_raw(images.to(self.accelerator.device, memory_format=torch.channels_last))
            return vae.layout.join(raw.z, raw.mean)

        write_latents(
            folder,
            self.pictures(self.train),
            encode,
            key=self._key(),
            variants=recipe.cache.variants,
            batch_size=recipe.cache.batch_size,
            dtype=recipe.cache.dtype,
            on_batch=self._watch("latents"),
        )
        if self.family.condition == "text":
            encoders = self.text_encoders()
            write_text(
                folder,
                CachedLatents(folder).captions,
                lambda captions: embed_captions(encoders, captions, self.shapes.transformer_class),
                batch_size=recipe.cache.batch_size,
                dtype=recipe.cache.dtype,
                on_batch=self._watch("captions"),
            )

    def text_encoders(self) -> Any:
        """The pretrained pipeline without what does not read prompts."""
        return load_pipeline(self.model, without=("vae", "transformer")).to(self.accelerator.device)

    def _store_statistics(self, vae: DetailVAE, meta: CacheMeta) -> None:
        mean, std = torch.tensor(meta.mean).view(1, -1, 1, 1), torch.tensor(meta.std).view(1, -1, 1, 1)
        vae.set_detail_statistics(vae.layout.split(mean)[1].flatten(), vae.layout.split(std)[1].flatten())
        save_model(vae, self.out / "vae")

    # -- stage 2 -----------------------------------------------------------------------------------------------

    def stage2_task(self) -> Stage2Task:
        read_meta(self.first / "cache", self._key())
        vae = self.vae()
        seed_initial_weights(training_seed(self.recipe.stage2, self.recipe.run))
        device = self.accelerator.device
        pretrained = load_part(self.model, "transformer", self.shapes.transformer_class)
        transformer = expand_transformer(pretrained, self.recipe.detail_channels, self.recipe.stage2.new_weights)
        cache = CachedLatents(self.first / "cache", self.family.condition)
        task = Stage2Task(
            self.recipe.stage2,
            vae.layout,
            transformer,
            cache,
            (vae.mean, vae.std),  # type: ignore[arg-type]
            conditioning(transformer, cache, device, null_text=reads_silent_t5(self.model)),
            device,
        )
        if self.init is not None:
            load_trained(task.transformer, self.init / UPGRADE_FILE)
        return task

    def train_dit(self) -> Path:
        """Stage 2 and the export; returns the pipeline's folder."""
        target = self.out / "pipeline"
        if not self.folder.done("stage2"):
            task = self.stage2_task()
            recipe = self.recipe
            trainer = Trainer(
                task, recipe.run, self.folder, self.accelerator, self.observer, stage2_pictures(self, task)
            )
            trainer.fit(recipe.data.num_workers)
            trainer.use_average()
            state = trainer.whole_state("transformer")
            tensors = {name: state[name] for name in task.players["transformer"].trained}
            trainer.release()

            def export() -> None:
                base, file = load_pipeline(self.model), self.out / UPGRADE_FILE
                wide = expand_transformer(base.transformer, recipe.detail_channels)
                save_upgrade(wide, file, recipe.stage2.lora, torch.float32, tensors)
                vae = DetailVAE.from_pretrained(self.first / "vae")
                save_pipeline(assemble(base, vae, apply_upgrade(base.transformer, file)), target)

            on_main(export)
            self.folder.mark_done("stage2")
        return target

    def run(self) -> Path:
        """Every step in order."""
        self.train_vae()
        self.cache_latents()
        return self.train_dit()
