"""Pictures of a training that still runs: its newest checkpoint, loaded beside it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from davae.app.pair import LOCK
from davae.backbones.classes import goes_by_class
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.backbones.trainable import choose_trainable
from davae.data.images import to_images
from davae.dataset.opened import open_pictures
from davae.errors import RunError
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import assemble, fuse
from davae.recipes import Recipe, load_recipe
from davae.sample.generate import generate
from davae.tasks.base_model import base_shapes, bucket_step
from davae.train.run_folder import load_checkpoint
from davae.vae.detail_vae import DetailVAE
from davae.zoo import resolve

PICTURES = 4
STEPS = 12

CheckpointImages = list[tuple[Image.Image, str]]


def checkpoint_images(folder: Path) -> CheckpointImages:
    """A few pictures of the newest checkpoint, with captions: reconstructions in stage 1, samples in stage 2.

    Empty before the first checkpoint, and when it cannot be read: a training removes old ones.
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
    """Trained parameters of a checkpoint into a module: their average where one is kept, as the export does."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    values = [state["players"][player][name] for name in trained]
    if player in state["ema"]:
        values = [state["ema"][player]["shadow"][name] for name in trained]
    for parameter, value in zip(trained.values(), values, strict=True):
        parameter.copy_(value)


def _reconstructions(folder: Path, recipe: Recipe, state: dict[str, Any]) -> CheckpointImages:
    vae = DetailVAE.from_base(_base(folder, recipe).vae, recipe.detail_channels, recipe.scale, recipe.downsample)
    _restore(vae, state, "vae")
    opened = open_pictures(recipe.stage1_data, recipe.resolution, bucket_step(recipe, base_shapes(recipe)))
    pictures = opened.squares(opened.shown(PICTURES))
    images = torch.stack([pictures[(i, -1)]["image"] for i in range(len(pictures))])  # (B,3,R,R)
    with torch.no_grad():
        raw = vae.encode_raw(images)
        decoded = vae.decode_raw(vae.layout.join(raw.z, raw.mean))
    kind = "held out" if opened.held_out else "training"
    shown: CheckpointImages = []
    for original, picture in zip(to_images(images), to_images(decoded), strict=True):
        shown += [(original, f"original, {kind}"), (picture, f"stage 1, step {state['step']}")]
    return shown


def _samples(folder: Path, recipe: Recipe, state: dict[str, Any]) -> CheckpointImages:
    base = _base(folder, recipe)
    transformer = expand_transformer(denoiser(base), recipe.detail_channels, recipe.stage2.new_weights)
    choose_trainable(transformer, recipe.stage2.lora)
    _restore(transformer, state, "transformer")
    vae = load_detail_vae(folder / "vae")
    pipeline = assemble(base, vae, fuse(transformer))  # type: ignore[arg-type]
    prompts = list(recipe.sampling.prompts[:PICTURES])
    if not prompts:
        prompts = [str(number) for number in range(PICTURES)] if goes_by_class(base) else [""]
    pictures = generate(
        pipeline,
        prompts,
        resolution=recipe.resolution,
        steps=min(STEPS, recipe.sampling.steps),
        guidance_scale=recipe.sampling.guidance_scale,
        seed=recipe.sampling.seed,
    )
    return [(picture, f"{prompt}, step {state['step']}") for prompt, picture in zip(prompts, pictures, strict=True)]
