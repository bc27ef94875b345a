"""Pretraining a base model from start to a diffusers folder: autoencoder, cache, transformer, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from davae.data.cache import CachedLatents, CacheMeta, fingerprint, read_meta, write_latents
from davae.data.pictures import Pictures
from davae.recipes.schema import BaseRecipe
from davae.train.base import AutoencoderTask, build_autoencoder
from davae.train.base_text import (
    BaseFlowTask,
    TextToImage,
    build_silent_t5,
    build_silent_tokenizer,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from davae.train.loop import Observer, Progress, Trainer
from davae.train.setup import make_accelerator, open_pictures, seed_initial_weights
from davae.train.state import RunFolder, new_folder


def train_base(recipe: BaseRecipe, out: Path, observer: Observer) -> Path:
    """Pretrain the recipe's model; returns the folder of its pipeline. Resumes what is already there."""
    folder = RunFolder(out, recipe)
    accelerator = make_accelerator(recipe.run)
    source, train, _ = open_pictures(recipe.data, recipe.resolution)
    pictures = Pictures(source, train, recipe.resolution, seed=recipe.run.seed, flip=recipe.data.flip)

    vae = _train_autoencoder(recipe, folder, pictures, accelerator, observer)
    meta = _cache(recipe, folder, pictures, vae, accelerator, observer)
    shift, scaling = whole_normalisation(meta)
    vae.register_to_config(shift_factor=shift, scaling_factor=scaling)

    cache = CachedLatents(out / "cache")
    tokenizer = build_tokenizer(cache.captions, recipe.architecture.vocabulary, recipe.architecture.text_tokens)
    seed_initial_weights(recipe.run.seed)
    encoders = [build_text_encoder(recipe, tokenizer) for _ in range(2)]
    model = TextToImage(encoders, build_transformer(recipe)).to(accelerator.device)
    task = BaseFlowTask(recipe, model, tokenizer, cache, (shift, scaling), accelerator.device)
    trainer = Trainer(task, recipe.run, folder, accelerator, observer)
    trainer.fit(recipe.data.num_workers)
    trainer.use_average()

    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.dit.timestep_shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,  # type: ignore[arg-type]
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,  # type: ignore[arg-type]
        text_encoder_3=build_silent_t5(recipe),
        tokenizer_3=build_silent_tokenizer(),  # type: ignore[arg-type]
    )
    # Text encoders stay float32: transformers loads what the file holds, diffusers' models load as float32, and a
    # pipeline opened without a dtype would mix both.
    model.transformer.half()
    vae.half()
    with new_folder(out / "pipeline") as partial:
        pipeline.save_pretrained(partial)
    folder.mark_done("dit")
    return out / "pipeline"


def _train_autoencoder(
    recipe: BaseRecipe, folder: RunFolder, pictures: Pictures, accelerator: Accelerator, observer: Observer
) -> AutoencoderKL:
    seed_initial_weights(recipe.run.seed)
    vae = build_autoencoder(recipe).to(accelerator.device)
    trainer = Trainer(
        AutoencoderTask(recipe, vae, pictures, accelerator.device), recipe.run, folder, accelerator, observer
    )
    trainer.fit(recipe.data.num_workers)
    trainer.use_average()
    folder.mark_done("vae")
    return vae.eval()


def _cache(
    recipe: BaseRecipe,
    folder: RunFolder,
    pictures: Pictures,
    vae: Any,
    accelerator: Accelerator,
    observer: Observer,
) -> CacheMeta:
    key = fingerprint(
        recipe.vae.model_dump(), recipe.architecture.model_dump(), recipe.data.model_dump(), recipe.resolution
    )
    target = folder.path / "cache"
    if (target / "meta.json").is_file():
        return read_meta(target, key)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        images = images.to(accelerator.device, memory_format=torch.channels_last)
        return vae.encode(images).latent_dist.mode()

    with new_folder(target) as partial:
        return write_latents(
            partial,
            pictures,
            encode,
            key=key,
            variants=recipe.cache.variants,
            batch_size=recipe.cache.batch_size,
            dtype=recipe.cache.dtype,
            on_batch=lambda done, total: observer(Progress("cache", done, total, 0.0)),
        )


def whole_normalisation(meta: CacheMeta) -> tuple[float, float]:
    """(shift_factor, scaling_factor) that give the latents mean 0 and variance 1 over all channels together."""
    mean, std = torch.tensor(meta.mean), torch.tensor(meta.std)
    shift = float(mean.mean())
    variance = float((std.square() + (mean - shift).square()).mean())
    return shift, 1 / math.sqrt(variance)
