"""Images of the newest checkpoint of a training, which may still run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from davae.app.pair import LOCK, watched
from davae.backbones.classes import class_count, goes_by_class
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.backbones.head_options import HeadOptions, attach_head
from davae.backbones.trainable import choose_trainable, restore_trained
from davae.cost.flops import count, meta_transformer
from davae.data.decoding import read_image
from davae.data.images import to_images
from davae.dataset.opened import open_pictures
from davae.errors import ModelError, RunError
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import own_device
from davae.publish.assemble import assemble, fuse
from davae.recipes import Recipe, load_recipe
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.tasks.base_model import BaseModel
from davae.train.run_folder import load_checkpoint
from davae.vae.detail_vae import DetailVAE

MOST = 4
STEPS, SECONDS = 12, 30.0
LARGEST = 100_000_000  # parameters of a transformer that the page loads next to a training
TRAINER_DRAWS = "a training with `run.sample_every` draws images itself"
SIDE = 2048  # pixels of the training's own images, at most

CheckpointImages = list[tuple[Image.Image, str]]

_slow: set[tuple[Path, str]] = set()  # run folder and stage of images that took too long


def newest_images_of(folder: Path) -> Path | None:
    """Return the newest grid that a training drew, else its newest checkpoint, if any."""
    for found in ((folder / "progress").glob("stage[12]*.png"), (folder / "checkpoints").glob("stage[12]-[0-9]*")):
        if paths := sorted(found):
            return paths[-1]
    return None


def checkpoint_images(folder: Path, newest: Path) -> CheckpointImages:
    """Return a few images of a checkpoint with captions, or the grid that the training drew.

    They are reconstructions in stage 1 and samples in stage 2. There are none where the checkpoint cannot be read: a
    training removes old ones. They are computed once, whatever the number of visitors, and never by a large model.

    Args:
        folder: of the run.
        newest: grid or checkpoint, as `newest_images_of` finds it.

    Raises:
        ModelError: a model that is too large or too slow to draw here.
        DataError: a grid that cannot be read.
    """
    if newest.suffix == ".png":
        grid = read_image(newest)
        grid.thumbnail((SIDE, SIDE))
        return [(grid, f"drawn by the training: {newest.stem}")]
    return _drawn(folder, newest, newest.stat().st_mtime_ns if newest.exists() else 0)


@lru_cache(maxsize=4)
def _drawn(folder: Path, checkpoint: Path, changed: int) -> CheckpointImages:
    recipe = load_recipe(str(folder / "recipe.yaml"))
    assert isinstance(recipe, Recipe)
    base, stage = BaseModel.of(recipe, folder), checkpoint.name.partition("-")[0]
    if (folder, stage) in _slow or count(meta_transformer(base.shapes).parameters()) > LARGEST:
        raise ModelError(f"this model is too large or too slow to draw here; {TRAINER_DRAWS}")
    try:
        state = load_checkpoint(checkpoint)
    except RunError:
        return []
    pipeline = _load_base(base.name)
    with LOCK:
        end = time.monotonic() + SECONDS

        def check(_: int = 0) -> None:
            if time.monotonic() > end:
                _slow.add((folder, stage))
                raise ModelError(f"images of a checkpoint take over {SECONDS:.0f} seconds here; {TRAINER_DRAWS}")

        return (_samples if stage == "stage2" else _reconstructions)(folder, recipe, state, pipeline, check)


@lru_cache(maxsize=1)
def _load_base(model: str) -> Any:
    return load_pipeline(model)


def _reconstructions(
    folder: Path, recipe: Recipe, state: dict[str, Any], base: Any, check: Callable[[], None]
) -> CheckpointImages:
    vae = DetailVAE.from_base(base.vae, recipe.detail_channels, recipe.scale, recipe.downsample)
    restore_trained(vae, state, "vae")
    vae.to(own_device())  # type: ignore[arg-type]
    opened = open_pictures(recipe.stage1_data, recipe.resolution, BaseModel.of(recipe).bucket_step(recipe.scale))
    dataset = opened.squares(opened.shown(MOST))
    kind = "held out" if opened.held_out else "training"
    shown: CheckpointImages = []
    for place in range(len(dataset)):
        check()
        image = dataset[(place, -1)]["image"][None].to(vae.device)  # (1,3,R,R)
        with torch.no_grad():
            raw = vae.encode_raw(image)
            decoded = vae.decode_raw(vae.layout.join(raw.z, raw.mean))
        shown += [
            (to_images(image)[0], f"original, {kind}"),
            (to_images(decoded)[0], f"stage 1, step {state['step']}"),
        ]
    return shown


def _samples(
    folder: Path, recipe: Recipe, state: dict[str, Any], base: Any, check: Callable[[int], None]
) -> CheckpointImages:
    stage2 = recipe.stage2
    transformer = expand_transformer(denoiser(base), recipe.detail_channels, stage2.new_weights, stage2.detail_offset)
    attach_head(transformer, HeadOptions.of(stage2))  # type: ignore[arg-type]
    choose_trainable(transformer, recipe.stage2.lora)
    restore_trained(transformer, state, "transformer")
    vae = load_detail_vae(folder / "vae")
    pipeline = assemble(base, vae, fuse(transformer)).to(own_device())  # type: ignore[arg-type]
    prompts = list(recipe.sampling.prompts[:MOST])
    if not prompts:
        prompts = [str(number) for number in range(min(MOST, class_count(base)))] if goes_by_class(base) else [""]
    options = SamplingOptions(
        resolution=recipe.resolution,
        steps=min(STEPS, recipe.sampling.steps),
        guidance=recipe.sampling.guidance_scale,
        seed=recipe.sampling.seed,
    )
    with watched(denoiser(pipeline), check):
        images = generate(pipeline, prompts, options)
    return [(image, f"{prompt}, step {state['step']}") for prompt, image in zip(prompts, images, strict=True)]
