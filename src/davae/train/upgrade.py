"""The way from a pretrained pipeline to an upgraded one: stage 1, latent cache, stage 2, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data.buckets import bucket_sizes
from davae.data.cache import CachedLatents, CacheMeta, is_whole, read_meta
from davae.data.cache_key import Key
from davae.data.pictures import DataError, Pictures
from davae.latent import LatentLayout
from davae.models.autoencoder_families import autoencoder_family
from davae.models.detail_vae import DetailVAE
from davae.models.expand import expand_transformer
from davae.models.families import model_class, transformer_family
from davae.models.pipeline import (
    BaseShapes,
    ModelError,
    denoiser,
    embed_captions,
    load_part,
    load_pipeline,
    load_scheduler,
    load_text_encoders,
    read_shapes,
    reads_silent_t5,
)
from davae.recipes import Recipe, RecipeError, differences, load_recipe
from davae.train.base_run import planned_shapes, train_base
from davae.train.caching import cache_key, cache_pictures, cache_shards, tell_left_out
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
from davae.train.objectives import FLOW, Objective, check_timesteps, choose_objective
from davae.train.opened import fills, open_pictures
from davae.train.progress import stage1_pictures, stage2_pictures
from davae.train.ranks import from_main, is_main, on_main
from davae.train.setup import make_accelerator, seed_initial_weights
from davae.train.stage1 import Stage1Task
from davae.train.stage2 import Stage2Task
from davae.train.state import RunFolder, new_folder
from davae.zoo import resolve, resolve_upgrade


def check_recipe(recipe: Recipe, shapes: BaseShapes) -> LatentLayout:
    """What a recipe can get wrong about its base model, before any weight is read.

    Raises:
        RecipeError: D not a multiple of C, a size that does not divide or that the model cannot draw, a distilled model, or
            gradient checkpointing where the class has none, with the dotted path.
    """
    if shapes.pipeline_class in transformer_family(shapes.transformer_class).distilled:
        raise RecipeError(
            f"base.model: {recipe.base.name} is a {shapes.pipeline_class}, distilled to a few steps, which flow matching "
            f"would undo; upgrade the model that it was distilled from instead: SANA-1.5"
        )
    if recipe.detail_channels % shapes.channels:
        raise RecipeError(
            f"detail_channels: {recipe.detail_channels} is not a multiple of the {shapes.channels} latent channels of "
            f"{recipe.base.name}; use {shapes.channels * max(1, round(recipe.detail_channels / shapes.channels))}"
        )
    if recipe.scale & (recipe.scale - 1):
        raise RecipeError(f"scale: {recipe.scale} is not a power of two")
    for stage, settings, has in (
        ("stage1", recipe.stage1, autoencoder_family(shapes.vae_class).checkpointing),
        ("stage2", recipe.stage2, model_class(shapes.transformer_class)._supports_gradient_checkpointing),
    ):
        if settings.gradient_checkpointing and not has:
            kind = shapes.vae_class if stage == "stage1" else shapes.transformer_class
            raise RecipeError(
                f"{stage}.gradient_checkpointing: diffusers' {kind} has none that works; set it to false"
            )
    cell = shapes.patch_size * transformer_family(shapes.transformer_class).grid
    step = shapes.vae_factor * cell
    if recipe.base.resolution % step:
        below = recipe.base.resolution // step * step
        raise RecipeError(
            f"base.resolution: {recipe.base.resolution} is not divisible by {step} (autoencoder factor "
            f"{shapes.vae_factor} x patch {cell}); use {below or step} or {below + step}"
        )
    if transformer_family(shapes.transformer_class).condition == "class":
        own = shapes.transformer_config["sample_size"] * shapes.vae_factor
        if recipe.base.resolution != own:
            raise RecipeError(f"base.resolution: {recipe.base.name} draws {own} pixels and no other size; use {own}")
    return LatentLayout(shapes.channels, recipe.detail_channels, recipe.scale)


SHARED_STEPS = ("base", "scale", "detail_channels", "init", "downsample", "data", "stage1", "cache")


def check_shared(recipe: Recipe, folder: Path) -> None:
    """That another run's DetailVAE and cache are what this recipe would make.

    Raises:
        DataError: it is no finished run up to its cache, or its recipe differs before stage 2 (says where).
    """
    if not (folder / "recipe.yaml").is_file() or not is_whole(folder / "cache"):
        raise DataError(f"--stage1 {folder} holds no run with a whole cache; run `davae cache-latents` there first")
    other = load_recipe(str(folder / "recipe.yaml"))
    if not isinstance(other, Recipe):
        raise DataError(f"--stage1 {folder} is a run of the base recipe '{other.name}', not of an upgrade")
    changed = [
        change
        for change in differences(other, recipe, free=("num_workers",))
        if change.partition(":")[0].partition(".")[0] in SHARED_STEPS
    ]
    if changed:
        raise DataError(f"--stage1 {folder} was made from another autoencoder or data: {changed[0]}")


def save_model(model: Any, folder: Path) -> None:
    with new_folder(folder) as partial:
        model.eval().save_pretrained(partial)


def base_shapes(recipe: Recipe) -> BaseShapes:
    """Shapes of the recipe's base model, trained already or not."""
    if recipe.base.train is not None:
        return planned_shapes(recipe.base.train)
    assert recipe.base.model is not None
    return read_shapes(resolve(recipe.base.model))


def base_objective(recipe: Recipe, shapes: BaseShapes, configs: str | None = None) -> Objective:
    """What the recipe's base model predicts, by its own scheduler; one that is trained first does by flow matching.

    Args:
        configs: where to read them, when not from the model itself.

    Raises:
        ModelError: an objective that stage 2 cannot train.
        RecipeError: timesteps shaped for a model whose timesteps are uniform.
    """
    if recipe.base.model is None:
        return FLOW
    model = configs or resolve(recipe.base.model)
    objective = choose_objective(
        load_scheduler(model), transformer_family(shapes.transformer_class), recipe.base.model
    )
    stated = shapes.transformer_config.get("prediction_type")  # LightningDiT says it of itself
    if stated is not None and (stated == "epsilon") != (objective.prediction == "epsilon"):
        raise ModelError(
            f"model {recipe.base.model}: its transformer predicts {stated}, its scheduler stands for {objective.prediction}; "
            "put the scheduler that the model was trained with into its folder"
        )
    check_timesteps(recipe.stage2, objective)
    return objective


def bucket_step(recipe: Recipe, shapes: BaseShapes) -> int | None:
    """Pixels that a token spans; None for models of square pictures alone.

    Raises:
        RecipeError: a bucket longer than the transformer's table of positions.
    """
    if transformer_family(shapes.transformer_class).condition == "class":
        return None
    step = shapes.vae_factor * recipe.scale * shapes.patch_size
    longest = shapes.transformer_config.get("pos_embed_max_size")
    buckets = recipe.data.buckets
    if buckets is not None and longest is not None:
        sizes = bucket_sizes(recipe.resolution, step, buckets.max_ratio, buckets.tokens)
        side = max(max(size) for size in sizes) // step
        if side > longest:
            raise RecipeError(
                f"data.buckets.max_ratio: {buckets.max_ratio} asks for {side} tokens in a row, {recipe.base.name} knows "
                f"positions up to {longest}; lower it"
            )
    return step


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
        self.objective = base_objective(recipe, self.shapes)
        self.opened = open_pictures(recipe.data, recipe.resolution, bucket_step(recipe, self.shapes))
        self.train, self.held_out = self.opened.train, self.opened.held_out
        self.init = None if recipe.init is None else resolve_upgrade(recipe.init)
        if self.init is not None:
            read_metadata(self.init / UPGRADE_FILE)  # a wrong folder is told now, not after the cache is written
        self.recipe, self.out = recipe, out
        self.observer: Observer = observer if is_main() else lambda progress: None
        if stage1 is not None:
            check_shared(recipe, stage1)
        self.folder = RunFolder(out, recipe)
        self.skipped = dict(self.opened.left_out)  # pictures that cannot be used, and why; more are met while reading

    @cached_property
    def base(self) -> Any:
        """The whole pretrained pipeline, on the device: for pictures. Training steps load the parts that they need."""
        return load_pipeline(self.model).to(self.accelerator.device)

    def pictures(self, indices: list[int]) -> Pictures:
        """Chosen pictures as squares, for what is measured and shown."""
        pictures = Pictures(self.opened.source, indices, self.recipe.resolution, seed=self.recipe.run.seed)
        pictures.skipped = self.skipped
        return pictures

    def training_pictures(self) -> Pictures:
        """The training set, in its buckets."""
        pictures = self.opened.pictures(self.recipe.data, self.recipe.run.seed)
        pictures.skipped = self.skipped
        return pictures

    def square_training(self) -> list[int]:
        """Training pictures that fill the square: what is measured where nothing is held out."""
        opened, square = self.opened, self.opened.sizes[0]
        return [
            i for i, g in zip(opened.train, opened.groups, strict=True) if fills(opened.source, i, square, int(g))
        ]

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
        return Stage1Task(recipe.stage1, self.new_vae(), self.training_pictures(), self.accelerator.device)

    def vae(self) -> DetailVAE:
        return DetailVAE.from_pretrained(self.first / "vae").to(self.accelerator.device).eval()  # type: ignore[return-value]

    # -- cache -------------------------------------------------------------------------------------------------

    def cache_key(self, vae: DetailVAE) -> Key:
        recipe = self.recipe
        speaks = self.family.condition == "text" and recipe.cache.shards is None
        return cache_key(
            vae,
            self.opened,
            recipe.data,
            recipe.cache,
            resolution=recipe.resolution,
            seed=recipe.run.seed,
            text=recipe.base.model_dump(mode="json", exclude_defaults=True) if speaks else None,
        )

    def _watch(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.observer(Progress(name, done, total, 0.0))

    def cache_latents(self) -> Path:
        """Raw latents of the training set, detail statistics (written into the DetailVAE's config), and text.

        A cache that was interrupted goes on at its last whole shard; one of another key is made again.
        """
        target = self.first / "cache"
        if self.first == self.out and not from_main(self.folder.done("cache") and is_whole(target)):
            vae = self.vae()
            key = self.cache_key(vae)
            self.write_cache(vae, target, key)
            meta = read_meta(target, key)
            if self.init is None:  # weights to go on from were trained on the statistics they came with
                on_main(partial(self._store_statistics, vae, meta))
            if self.recipe.cache.shards is None:
                tell_left_out(self.out / "pictures.json", len(self._used(meta)), self.skipped, self.accelerator)
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
        if self.family.classes_key is None:
            raise RecipeError("cache.shards: latent shards hold class labels; they train class-conditional models")
        cache_shards(
            folder,
            self.recipe.cache,
            channels=self.layout.channels,
            num_classes=int(self.shapes.transformer_config[self.family.classes_key]),
            key=key,
            accelerator=self.accelerator,
            watch=self._watch,
        )

    def _cache_pictures(self, vae: DetailVAE, folder: Path, key: Key) -> None:
        def encode(images: Tensor) -> Tensor:
            raw = vae.encode_raw(images)
            return vae.layout.join(raw.z, raw.mean)

        cache_pictures(
            folder,
            self.training_pictures(),
            encode,
            key=key,
            cache=self.recipe.cache,
            num_workers=self.recipe.data.num_workers,
            accelerator=self.accelerator,
            watch=self._watch,
            embed=self.embedder() if self.family.condition == "text" else None,
        )

    def text_encoders(self) -> Any:
        """The pretrained pipeline without its transformer."""
        component, config = self.family.component, self.shapes.transformer_config
        return load_text_encoders(self.model, component, config).to(self.accelerator.device)

    def embedder(self) -> Callable[[list[str]], tuple[Tensor, ...]]:
        """Captions -> what the text encoders say of them, one tensor per kind; the encoders are loaded when first asked."""
        encoders = cache(self.text_encoders)
        return lambda captions: embed_captions(encoders(), captions, self.shapes.transformer_class)

    def _store_statistics(self, vae: DetailVAE, meta: CacheMeta) -> None:
        mean, std = torch.tensor(meta.mean).view(1, -1, 1, 1), torch.tensor(meta.std).view(1, -1, 1, 1)
        vae.set_detail_statistics(vae.layout.split(mean)[1].flatten(), vae.layout.split(std)[1].flatten())
        save_model(vae, self.out / "vae")

    # -- stage 2 -----------------------------------------------------------------------------------------------

    def stage2_task(self) -> Stage2Task:
        vae = self.vae()
        read_meta(self.first / "cache", self.cache_key(vae))
        seed_initial_weights(training_seed(self.recipe.stage2, self.recipe.run))
        device = self.accelerator.device
        pretrained = load_part(self.model, self.family.component, self.shapes.transformer_class)
        transformer = expand_transformer(pretrained, self.recipe.detail_channels, self.recipe.stage2.new_weights)
        cache = CachedLatents(self.first / "cache", self.family.condition)
        task = Stage2Task(
            self.recipe.stage2,
            vae.layout,
            transformer,
            cache,
            (vae.mean, vae.std),  # type: ignore[arg-type]
            conditioning(
                transformer,
                cache,
                device,
                null_text=reads_silent_t5(self.model),
                pixel_factor=vae.spatial_factor,
                scheduler=load_scheduler(self.model),
            ),
            self.objective,
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
                pretrained = denoiser(base)
                wide = expand_transformer(pretrained, recipe.detail_channels)
                save_upgrade(wide, file, recipe.stage2.lora, torch.float32, tensors)
                vae = DetailVAE.from_pretrained(self.first / "vae")
                save_pipeline(assemble(base, vae, apply_upgrade(pretrained, file)), target)

            on_main(export)
            self.folder.mark_done("stage2")
        return target

    def run(self) -> Path:
        """Every step in order."""
        self.train_vae()
        self.cache_latents()
        return self.train_dit()
