"""Images of the newest checkpoint of a training, which may still run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from davae.app.pair import LOCK
from davae.backbones.classes import class_count, goes_by_class
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.backbones.head_options import BUFFERS, HeadOptions, attach_head
from davae.backbones.trainable import choose_trainable
from davae.data.images import to_images
from davae.dataset.opened import open_pictures
from davae.errors import RunError
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import assemble, fuse
from davae.recipes import Recipe, load_recipe
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.tasks.base_model import BaseModel
from davae.train.run_folder import load_checkpoint
from davae.vae.detail_vae import DetailVAE
from davae.zoo import resolve

MOST = 4
STEPS = 12

CheckpointImages = list[tuple[Image.Image, str]]


def checkpoint_images(folder: Path) -> CheckpointImages:
    """Return a few images of the newest checkpoint, with captions.

    They are reconstructions in stage 1 and samples in stage 2. There are none before the first checkpoint, and none where it
    cannot be read: a training removes old ones.
    """
    for stage in ("stage2", "stage1"):
        found = sorted((folder / "checkpoints").glob(f"{stage}-[0-9]*"))
        if found:
            try:
                state = load_checkpoint(found[-1])
            except RunError:
                return []
            recipe = load_recipe(str(folder / "recipe.yaml"))
            assert isinstance(recipe, Recipe)
            with LOCK:
                return (_samples if stage == "stage2" else _reconstructions)(folder, recipe, state)
    return []


def _base(folder: Path, recipe: Recipe) -> Any:
    return _load_base(resolve(recipe.base.model) if recipe.base.model else str(folder / "base" / "pipeline"))


@lru_cache(maxsize=1)
def _load_base(model: str) -> Any:
    return load_pipeline(model)


@torch.no_grad()
def _restore(module: torch.nn.Module, state: dict[str, Any], player: str) -> None:
    """Copy the trained parameters of a checkpoint, or their kept average, into a module."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    values = [state["players"][player][name] for name in trained]
    if player in state["ema"]:
        values = [state["ema"][player]["shadow"][name] for name in trained]
    for parameter, value in zip(trained.values(), values, strict=True):
        parameter.copy_(value)
    for name, buffer in module.named_buffers():
        if name.startswith(BUFFERS):
            buffer.copy_(state["players"][player][name])


def _reconstructions(folder: Path, recipe: Recipe, state: dict[str, Any]) -> CheckpointImages:
    vae = DetailVAE.from_base(_base(folder, recipe).vae, recipe.detail_channels, recipe.scale, recipe.downsample)
    _restore(vae, state, "vae")
    opened = open_pictures(recipe.stage1_data, recipe.resolution, BaseModel.of(recipe).bucket_step(recipe.scale))
    dataset = opened.squares(opened.shown(MOST))
    images = torch.stack([dataset[(i, -1)]["image"] for i in range(len(dataset))])  # (B,3,R,R)
    with torch.no_grad():
        raw = vae.encode_raw(images)
        decoded = vae.decode_raw(vae.layout.join(raw.z, raw.mean))
    kind = "held out" if opened.held_out else "training"
    shown: CheckpointImages = []
    for original, image in zip(to_images(images), to_images(decoded), strict=True):
        shown += [(original, f"original, {kind}"), (image, f"stage 1, step {state['step']}")]
    return shown


def _samples(folder: Path, recipe: Recipe, state: dict[str, Any]) -> CheckpointImages:
    base = _base(folder, recipe)
    stage2 = recipe.stage2
    transformer = expand_transformer(denoiser(base), recipe.detail_channels, stage2.new_weights, stage2.detail_offset)
    attach_head(transformer, HeadOptions.of(stage2))  # type: ignore[arg-type]
    choose_trainable(transformer, recipe.stage2.lora)
    _restore(transformer, state, "transformer")
    vae = load_detail_vae(folder / "vae")
    pipeline = assemble(base, vae, fuse(transformer))  # type: ignore[arg-type]
    prompts = list(recipe.sampling.prompts[:MOST])
    if not prompts:
        prompts = [str(number) for number in range(min(MOST, class_count(base)))] if goes_by_class(base) else [""]
    images = generate(
        pipeline,
        prompts,
        SamplingOptions(
            resolution=recipe.resolution,
            steps=min(STEPS, recipe.sampling.steps),
            guidance=recipe.sampling.guidance_scale,
            seed=recipe.sampling.seed,
        ),
    )
    return [(image, f"{prompt}, step {state['step']}") for prompt, image in zip(prompts, images, strict=True)]
