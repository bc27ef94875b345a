"""Training of a base model: autoencoder, cache, transformer, export to a diffusers folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from davae.backbones.classes_by_name import model_class
from davae.data.conditions import check_conditions
from davae.data.images import ImageDataset
from davae.data.latent_cache.meta import CacheMeta, is_whole, read_meta
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.write import Watch
from davae.dataset.encoding import run_precision
from davae.dataset.opened import SUMMARY, OpenedData, announce, architecture_limits, bucket_notes, open_pictures
from davae.errors import DataError, RecipeError
from davae.files.ownership import check_run
from davae.pretrained.autoencoders import load_autoencoder
from davae.publish.assemble import save_pipeline
from davae.recipes.base import BaseRecipe, ClassArchitecture, TextArchitecture
from davae.runs.cache import cache_images, cache_key, cache_shards, check_shards, show_cache, write_skipped
from davae.runs.checks import check_perceptual
from davae.tasks.autoencoder import AutoencoderTask, build_autoencoder
from davae.tasks.base_model import planned_shapes
from davae.tasks.class_conditional import ClassFlowTask, build_class_transformer, check_start
from davae.tasks.text_to_image import (
    BaseFlowTask,
    TextToImage,
    build_silent_t5,
    build_silent_tokenizer,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from davae.train.accelerator import check_base_engine, make_accelerator, seed_initial_weights
from davae.train.distributed import from_main, is_main, on_main
from davae.train.loop import Observer, Trainer, training_seed
from davae.train.ready import check_trainings
from davae.train.run_folder import RunFolder, was_done
from davae.vae.codec import Codec
from davae.zoo import resolve


class BaseRun:
    """One run of a base recipe. Each step returns at once when it was finished before.

    Args:
        recipe: what to do.
        out: the run's folder.
        observer: called after every logged step.
        first: the folder of another run, equal up to the cache, whose autoencoder (`vae/`) and cache to use: one that
            `prepare` left, or the stage 1 of an upgrade, whose DetailVAE then is the autoencoder.
    """

    def __init__(self, recipe: BaseRecipe, out: Path, observer: Observer, *, first: Path | None = None):
        check_run(out, partial(was_done, out))  # before any work
        self.recipe, self.out = recipe, out
        self.first = out if first is None else first
        self.accelerator = make_accelerator(recipe.run, out)
        self.observer: Observer = observer if is_main() else lambda progress: None
        check_base_engine(self.accelerator)
        self.check_recipe()
        self.folder = RunFolder(out, recipe)

    # -- what another way to a base model changes ----------------------------------------------------------------

    def check_recipe(self) -> None:
        """Check what configs and headers show, before anything is trained or encoded."""
        recipe = self.recipe
        if self.first != self.out:
            recipe = recipe.model_copy(update={"autoencoder": str(self.first / "vae"), "vae": None})
        shapes = planned_shapes(recipe)
        if not was_done(self.first, "vae"):
            check_perceptual(recipe.vae)
        check_trainings(recipe.trainings, recipe.run)
        if recipe.init is not None:
            check_start(recipe, shapes.channels)
        if recipe.cache.shards is not None:
            side, classes = recipe.resolution // shapes.vae_factor, getattr(recipe.architecture, "num_classes", None)
            check_shards(recipe.cache, shapes.channels, side, classes)

    def check_autoencoder(self, vae: Any) -> None:
        """Check the autoencoder before its cache is written."""

    def prepare_transformer(self, transformer: Any, cache: CachedLatents, vae: Any) -> None:
        """Change a class-conditional transformer before it trains."""

    # -- data --------------------------------------------------------------------------------------------------

    @cached_property
    def opened(self) -> OpenedData:
        """Return the images of the recipe, summarised."""
        try:
            return self._opened()
        except DataError:
            self.folder.close()  # for a corrected recipe
            raise

    def _opened(self) -> OpenedData:
        recipe, step = self.recipe, None
        if isinstance(recipe.architecture, TextArchitecture):
            step = planned_shapes(recipe).vae_factor * recipe.architecture.patch_size
        opened, stage = open_pictures(recipe.data, recipe.resolution, step, folder=self.out), recipe.dit
        opened.keep(self.out)
        summary = opened.summary(
            architecture_limits(recipe), bucket_notes(opened, "dit", stage, recipe.cache.variants)
        )
        announce(summary, self.out / SUMMARY)
        if recipe.cache.shards is None and not from_main(is_whole(self.first / "cache")):
            check_conditions(summary, getattr(recipe.architecture, "num_classes", None), recipe.data.require_captions)
        return opened

    @cached_property
    def images(self) -> ImageDataset:
        """The training images as the cache encodes them."""
        return self.opened.pictures(self.recipe.data, self.recipe.run.seed).enumerating()

    def prepare(self) -> Path:
        """Do the steps up to the cache and return the folder of the normalised autoencoder."""
        target = self.out / "vae"
        if not from_main(self.folder.done("cache") and is_whole(self.out / "cache")):
            vae = self.cached_autoencoder()[0]
            on_main(partial(save_pipeline, vae, target))
            self.folder.mark_done("cache")
        return target

    def run(self) -> Path:
        """Do every step in order and return the folder of the pipeline."""
        vae, channels, side = self.cached_autoencoder()
        train = self.train_class if isinstance(self.recipe.architecture, ClassArchitecture) else self.train_text
        pipeline = train(vae, channels, side)
        on_main(partial(save_pipeline, pipeline, self.out / "pipeline"))
        self.folder.mark_done("dit")
        return self.out / "pipeline"

    # -- autoencoder -------------------------------------------------------------------------------------------

    def cached_autoencoder(self) -> tuple[Any, int, int]:
        """Return the normalised autoencoder, channels and side of its latents, with a whole cache.

        Raises:
            RecipeError: images that do not divide into its tokens.
        """
        recipe, patch = self.recipe, self.recipe.architecture.patch_size
        vae = self.autoencoder()
        codec = Codec(vae)
        factor, channels = codec.factor, codec.channels
        if recipe.resolution % (factor * patch):
            raise RecipeError(
                f"resolution: {recipe.resolution} is not divisible by {factor * patch} "
                f"(autoencoder factor {factor} x patch {patch})"
            )
        self.check_autoencoder(vae)
        meta = self.cache(vae, channels)
        if not isinstance(recipe.autoencoder, str):
            vae.register_to_config(**self._normalisation(meta))
        return vae, channels, recipe.resolution // factor

    def autoencoder(self) -> Any:
        """Return the trained or pretrained autoencoder, in eval mode."""
        recipe = self.recipe
        if self.first != self.out:
            return load_autoencoder(str(self.first / "vae")).to(self.accelerator.device)
        if isinstance(recipe.autoencoder, str):
            return load_autoencoder(resolve(recipe.autoencoder)).to(self.accelerator.device)
        assert recipe.vae is not None
        seed_initial_weights(training_seed(recipe.vae, recipe.run))
        vae: Any = build_autoencoder(recipe).to(self.accelerator.device)
        images = self.opened.pictures(recipe.data, recipe.run.seed)
        images.skipped = self.images.skipped
        task = AutoencoderTask(recipe.vae, vae, images, self.accelerator.device)
        trainer = Trainer(task, recipe.run, self.folder, self.accelerator, self.observer)
        trainer.fit(recipe.data.num_workers)
        trainer.use_average()
        self.folder.mark_done("vae")
        return vae.eval()

    def _normalisation(self, meta: CacheMeta) -> dict[str, Any]:
        """Return the config entries that normalise the new autoencoder's latents."""
        if isinstance(self.recipe.architecture, ClassArchitecture):
            return {"latents_mean": meta.mean, "latents_std": meta.std, "scaling_factor": 1.0, "shift_factor": None}
        shift, scaling = whole_normalisation(meta)
        return {"shift_factor": shift, "scaling_factor": scaling}

    # -- cache -------------------------------------------------------------------------------------------------

    def cache(self, vae: Any, channels: int) -> CacheMeta:
        recipe, target = self.recipe, self.first / "cache"
        key = cache_key(
            vae, self.opened, recipe.data, recipe.cache, resolution=recipe.resolution, seed=recipe.run.seed
        )
        # one answer for all: the first process may be writing it already; another run's cache is never written here
        if self.first != self.out or from_main(is_whole(target)):
            return read_meta(target, key)
        architecture = recipe.architecture
        options: dict[str, Any] = {"key": key, "accelerator": self.accelerator, "watch": self.watch}
        if recipe.cache.shards is not None:
            number = architecture.num_classes if isinstance(architecture, ClassArchitecture) else None
            cache_shards(target, recipe.cache, channels=channels, num_classes=number, **options)
            return read_meta(target, key)
        meta = cache_images(
            target, self.images, vae, cache=recipe.cache, precision=run_precision(recipe.run),
            num_workers=recipe.data.num_workers, **options,
        )  # fmt: skip
        skipped = {**self.opened.left_out, **meta.skipped}
        used = len(self.opened.train) - len(meta.skipped)
        write_skipped(self.out / "pictures.json", used, skipped, self.accelerator)
        return meta

    @property
    def watch(self) -> Callable[[str], Watch]:
        """Return what shows how far each part of a cache is."""
        return show_cache(self.observer, "cache ")

    # -- transformer -------------------------------------------------------------------------------------------

    def fit(self, task: Any, release: bool = False) -> None:
        """Train a task to its end, and free its optimizer where another training follows."""
        trainer = Trainer(task, self.recipe.run, self.folder, self.accelerator, self.observer)
        trainer.fit(self.recipe.data.num_workers)
        trainer.use_average()
        if release:
            trainer.release()

    def train_text(self, vae: Any, channels: int, side: int) -> Any:
        recipe, architecture = self.recipe, self.recipe.architecture
        assert isinstance(architecture, TextArchitecture)
        cache = CachedLatents(self.first / "cache")
        tokenizer = build_tokenizer(cache.captions, architecture.vocabulary, architecture.text_tokens)
        seed_initial_weights(training_seed(recipe.dit, recipe.run))
        encoders = [build_text_encoder(architecture, tokenizer) for _ in range(2)]
        model = TextToImage(encoders, build_transformer(architecture, channels, side)).to(self.accelerator.device)
        self.fit(BaseFlowTask(recipe.dit, model, tokenizer, cache, Codec(vae).statistics, self.accelerator.device))
        # Text encoders stay float32: transformers loads what the file holds, diffusers' models load as float32, and a
        # pipeline opened without a dtype would mix both.
        return StableDiffusion3Pipeline(
            transformer=model.transformer.half(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.dit.timestep_shift),
            vae=vae.half(),
            text_encoder=encoders[0],
            tokenizer=tokenizer,  # type: ignore[arg-type]
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizer,  # type: ignore[arg-type]
            text_encoder_3=build_silent_t5(architecture),
            tokenizer_3=build_silent_tokenizer(),  # type: ignore[arg-type]
        )

    def train_class(self, vae: Any, channels: int, side: int) -> Any:
        recipe = self.recipe
        cache = CachedLatents(self.first / "cache", "class")
        seed_initial_weights(training_seed(recipe.dit, recipe.run))
        transformer = build_class_transformer(recipe, channels, side)
        self.prepare_transformer(transformer, cache, vae)
        self.fit(ClassFlowTask(recipe, transformer, cache, Codec(vae).statistics, self.accelerator.device))
        return model_class("ClassConditionalPipeline")(
            vae=vae.half(), transformer=transformer.half(), class_names=first_captions(cache, recipe)
        )


def first_captions(cache: CachedLatents, recipe: BaseRecipe) -> list[str] | None:
    """Return the first caption of each class, None where the data has no captions."""
    assert isinstance(recipe.architecture, ClassArchitecture)
    names = [""] * recipe.architecture.num_classes
    for label, caption in zip(cache.conditions, cache.captions, strict=True):
        names[label] = names[label] or caption
    return names if any(names) else None


def whole_normalisation(meta: CacheMeta) -> tuple[float, float]:
    """Return (shift_factor, scaling_factor) by which all channels have mean 0 and variance 1."""
    mean, std = torch.tensor(meta.mean), torch.tensor(meta.std)
    shift = float(mean.mean())
    variance = float((std.square() + (mean - shift).square()).mean())
    return shift, 1 / math.sqrt(variance)
