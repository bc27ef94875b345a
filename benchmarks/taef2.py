"""Train a DetailVAE on TAEF2 (FLUX.2 latents, f8, 32 channels) and real photos.

    .venv/bin/python benchmarks/taef2.py

trains stage 1 on Imagenette's training photos at 128 px (at most 20 minutes on two cores), then encodes and decodes photos of
its validation set, which it never saw, and writes PSNR, SSIM and LPIPS next to those of TAEF2 itself at half the size,
enlarged bicubic: docs/results/taef2.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from davae import DetailVAE
from davae.convert.tiny import convert_tiny
from davae.dataset.opened import open_pictures
from davae.evaluate.generation import batches, real_pictures
from davae.evaluate.reconstruction import score_reconstructions
from davae.lab.bench.clock import machine
from davae.losses.perceptual import Lpips
from davae.pretrained.autoencoders import load_autoencoder
from davae.recipes import Recipe, load_recipe
from davae.tasks.stage1 import Stage1Task
from davae.train.accelerator import make_accelerator, seed_initial_weights
from davae.train.loop import Progress, Trainer
from davae.train.run_folder import RunFolder
from davae.vae.detail_vae import downsample
from davae.vae.frames import decode_latents, encode_mode

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LPIPS = SHARED / "weights" / "lpips" / "alex.safetensors"
RESOLUTION = 128


def settings(steps: int) -> Recipe:
    """Return stage 1 of the photo recipe with real LPIPS.

    Its other sections are not used.
    """
    recipe = load_recipe(
        "imagenette128-micro",
        [
            "name=taef2",
            f"data.source={SHARED}/data/imagenette128-train.tar",
            "data.holdout=0.0",
            "detail_channels=96",
            f"stage1.max_steps={steps}",
            "stage1.batch_size=8",
            "stage1.start=unfolded",
            "stage1.crop=64",  # a quarter of a picture's cost: four times the steps
            "stage1.lr=5.0e-4",
            "stage1.lambda_lpips=0.05",
            "stage1.lambda_align=0.1",
            "stage1.perceptual=lpips-alex",
            f"stage1.perceptual_weights={LPIPS}",
            "stage1.ema_decay=0.99",
        ],
    )
    assert isinstance(recipe, Recipe)
    return recipe


def train(recipe: Recipe, base: torch.nn.Module, folder: Path) -> DetailVAE:
    """Train or resume stage 1 alone."""
    seed_initial_weights(0)
    vae = DetailVAE.from_base(base, recipe.detail_channels, start=recipe.stage1.start)
    pictures = open_pictures(recipe.data, RESOLUTION).pictures(recipe.data, recipe.run.seed)
    accelerator = make_accelerator(recipe.run)
    task = Stage1Task(recipe.stage1, vae, pictures, accelerator.device)

    def told(progress: Progress) -> None:
        if progress.step % 50 == 0:
            sys.stderr.write(f"{progress.step}/{progress.max_steps} {progress.values}\n")

    trainer = Trainer(task, recipe.run, RunFolder(folder, recipe), accelerator, told)
    trainer.fit()
    trainer.use_average()
    return vae.eval()


def scores(reconstruct: Callable[[Tensor], Tensor], num: int) -> dict[str, float]:
    pictures = real_pictures(str(SHARED / "data" / "imagenette128-val.tar"), RESOLUTION, 0.0, "train")
    distances = {"lpips_alex": Lpips("alex", str(LPIPS))}
    with torch.no_grad():
        found = score_reconstructions(batches(pictures, num), reconstruct, distances, None).as_dict()
    return {key: found[key] for key in ("psnr", "ssim", "lpips_alex", "pictures")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num", type=int, default=500, help="validation photos that are measured")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "taef2")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if not (folder / "base").is_dir():
        weights = SHARED / "weights" / "taef2"
        convert_tiny(weights / "taef2_encoder.pth", weights / "taef2_decoder.pth", folder / "base")
    base = load_autoencoder(str(folder / "base"))

    started, busy = time.perf_counter(), time.process_time()
    vae = train(settings(arguments.steps), base, folder / "run")
    minutes, cpu_minutes = (time.perf_counter() - started) / 60, (time.process_time() - busy) / 60
    vae.save_pretrained(folder / "vae")

    def small(images: Tensor) -> Tensor:
        half = decode_latents(base, encode_mode(base, downsample(images, 2)))
        return F.interpolate(half, images.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)

    def upgraded(images: Tensor) -> Tensor:
        return vae.decode(vae.encode(images).latent_dist.mode()).sample

    figures = {
        "steps": arguments.steps,
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),  # of all cores together: two for 20 minutes are 40
        "taef2_at_64_enlarged": scores(small, arguments.num),
        "detail_vae_at_128": scores(upgraded, arguments.num),
        "machine": machine(),
    }
    target = ROOT / "docs" / "results" / "taef2.json"
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
