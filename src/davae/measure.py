"""What `davae sample` and `davae evaluate` do: open a model by name, draw from it, measure it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from davae.data.pictures import Pictures, split, to_tensor
from davae.data.sources import open_source, usable
from davae.evaluate.generation import GaussianFit, Lite0Features, fit, frechet_distance
from davae.evaluate.reconstruction import score_reconstructions
from davae.models.detail_vae import DetailVAE
from davae.models.families import check_autoencoder
from davae.models.pipeline import ModelError, load_pipeline
from davae.sample.generate import generate, grid
from davae.train.export import load_upgraded
from davae.train.state import saving
from davae.zoo import SHIPPED, UPGRADES, resolve


def open_model(name: str) -> tuple[Any, Path]:
    """(pipeline, folder for its samples) of a run folder, a pipeline folder, an embedded model or a hub id.

    `micro-upgraded` is the embedded model with the upgrade that ships with it.
    """
    folder = Path(name)
    if name in SHIPPED:
        return load_upgraded(load_pipeline(resolve(SHIPPED[name])), UPGRADES[SHIPPED[name]]), Path("samples") / name
    if (folder / "pipeline" / "model_index.json").is_file():
        return load_pipeline(str(folder / "pipeline")), folder / "samples"
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"run {name} has no pipeline yet; run its `davae upgrade` command to the end")
    return load_pipeline(resolve(name)), Path("samples") / folder.name


def sample_to_folder(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    *,
    num: int,
    seed: int,
    steps: int,
    guidance: float,
    on_batch: Callable[[int, int], None],
) -> Path:
    """Write `num` pictures of every prompt and one grid, a row a prompt; returns the grid's path."""
    wanted = [prompt for prompt in prompts for _ in range(num)]
    pictures = generate(pipeline, wanted, steps=steps, guidance_scale=guidance, seed=seed, on_batch=on_batch)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (prompt, picture) in enumerate(zip(wanted, pictures, strict=True)):
            words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40] or "picture"
            picture.save(folder / f"{words}-seed{seed}-{number:03d}.png")
        sheet = folder / f"grid-seed{seed}.png"
        grid(pictures, num).save(sheet)
    return sheet


def open_autoencoder(name: str) -> Any:
    """A DetailVAE or any supported diffusers autoencoder, from its folder, a run folder or an embedded model."""
    folder = Path(resolve(name))
    for candidate in (folder, folder / "vae"):
        config = candidate / "config.json"
        if config.is_file():
            kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
            if kind == "DetailVAE":
                return DetailVAE.from_pretrained(candidate).eval()
            try:
                check_autoencoder(str(kind))
            except ValueError as error:
                raise ModelError(f"{candidate}: {error}") from error
            return getattr(diffusers, str(kind)).from_pretrained(candidate, torch_dtype=torch.float32).eval()
    raise ModelError(f"{name} is no autoencoder folder (no config.json there or in vae/)")


def real_pictures(data: str, resolution: int, held_out: float, side: Literal["train", "held_out"]) -> Pictures:
    """Pictures of a source at `resolution`: all, or one side of the split that holds out this share."""
    source = open_source(data, resolution)
    indices = getattr(split(source, held_out), side) if held_out else list(range(len(source)))
    return Pictures(source, usable(source, indices, resolution), resolution)


def batches(pictures: Pictures, num: int | None = None, size: int = 16) -> Iterator[Tensor]:
    """Plain pictures in order, (B,3,R,R)."""
    count = len(pictures) if num is None else min(num, len(pictures))
    for start in range(0, count, size):
        yield torch.stack([pictures[(i, -1)]["image"] for i in range(start, min(start + size, count))])


def evaluate_reconstruction(
    vae: str, data: str, resolution: int | None, num: int | None, held_out: float
) -> dict[str, Any]:
    """Figures of `davae evaluate reconstruction`."""
    model = open_autoencoder(vae)
    size = resolution or int(model.config["sample_size"])

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        return model.decode(model.encode(images).latent_dist.mode()).sample

    scores = score_reconstructions(batches(real_pictures(data, size, held_out, "held_out"), num), reconstruct)
    return {"vae": vae, "data": data, "resolution": size, **scores.as_dict()}


def evaluate_generation(
    pipeline: str,
    data: str,
    *,
    num: int,
    resolution: int | None,
    compare_at: int | None,
    steps: int,
    guidance: float,
    seed: int,
    held_in: float,
    on_batch: Callable[[int, int], None],
) -> dict[str, Any]:
    """Figures of `davae evaluate generation`: FD-lite0 between samples and real pictures of the same captions."""
    model, _ = open_model(pipeline)
    own = model.transformer.config["sample_size"] * model.vae_scale_factor
    size = compare_at or resolution or own
    pictures = real_pictures(data, size, held_in, "train")
    order = np.random.default_rng(seed).permutation(max(num, len(pictures)))[:num] % len(pictures)
    prompts = [pictures[(int(i), -1)]["caption"] for i in order]
    network = Lite0Features()
    real = fit(batches(pictures), network)
    generated = GaussianFit()
    for start in range(0, num, 64):
        samples = generate(
            model,
            prompts[start : start + 64],
            resolution=resolution,
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            first=start,
            batch_size=32,
        )
        enlarged = [sample.resize((size, size), Image.Resampling.BILINEAR) for sample in samples]
        generated.update(network(torch.stack([to_tensor(sample) for sample in enlarged])))
        on_batch(min(start + 64, num), num)
    return {
        "pipeline": pipeline,
        "data": data,
        "fd_lite0": frechet_distance(generated, real),
        "generated": num,
        "real": real.count,
        "resolution": resolution or own,
        "compared_at": size,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
    }
