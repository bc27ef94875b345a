"""A run killed with `kill -9` at random moments and resumed, against one never killed.

    python benchmarks/kill_resume.py --kills 20

A tiny Stable Diffusion 3 with random weights goes through a whole upgrade (stage 1 with its discriminator, cache, stage 2,
export) in a child process; the parent kills it. Where a run gets to its end before all kills are spent, it is compared and
another one begins. Equal means: the same bits in the detail VAE, the upgrade file, the exported transformer and both stages'
last checkpoints (weights, EMA, optimizer), and the same metrics.jsonl but for `images_per_second`.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from davae.recipes import validate
from davae.runs.upgrade import Upgrade
from davae.tasks.autoencoder import build_autoencoder
from davae.tasks.text_to_image import (
    build_silent_t5,
    build_silent_tokenizer,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from davae.train.run_folder import load_checkpoint, read_metrics

SIZES = {
    "kind": "base",
    "name": "tiny",
    "resolution": 16,
    "autoencoder": {"channels": [8, 8], "norm_groups": 4, "latent_channels": 4},
    "architecture": {
        "family": "sd3", "text_width": 16, "text_layers": 1, "vocabulary": 600, "text_tokens": 8,
        "layers": 2, "heads": 2, "head_width": 8, "max_grid": 8,
    },
    "vae": {"max_steps": 1, "batch_size": 1},
    "dit": {"max_steps": 1, "batch_size": 1},
}  # fmt: skip


def quiet() -> None:
    """Let libraries show nothing, and compute with one thread, as the children do."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def tiny_base(folder: Path) -> None:
    """Write a whole pipeline of a few thousand random weights."""
    torch.manual_seed(0)
    recipe = validate(SIZES, "tiny")
    architecture, tokenizer = recipe.architecture, build_tokenizer(["a red square"], 600, 8)
    transformer = build_transformer(architecture, 4, 8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_autoencoder(recipe),
        text_encoder=build_text_encoder(architecture, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(architecture, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=build_silent_t5(architecture),
        tokenizer_3=build_silent_tokenizer(),
    ).save_pretrained(folder)


def pictures(folder: Path, count: int = 12) -> None:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {['red', 'blue'][number % 2]} square")


def recipe(place: Path, steps: int):
    return validate(
        {
            "name": "tiny",
            "base": {"model": str(place / "base"), "resolution": 16},
            "detail_channels": 8,
            "data": {"source": str(place / "pictures")},
            "stage1": {
                "max_steps": steps, "batch_size": 2, "perceptual": "lite0", "gan_start": 2, "gan_channels": 8,
                "gan_layers": 1, "detail_dropout": 0.2, "alignment": "adaptive",
            },
            "cache": {"variants": 2, "batch_size": 4},
            "stage2": {
                "max_steps": steps, "batch_size": 2, "accumulation": 2, "warmup_steps": 2, "lora": {"rank": 2},
                "new_weight_lr_multiplier": 3,
            },
            "run": {"log_every": 1, "checkpoint_every": 3},
        },
        "tiny",
    )  # fmt: skip


def start(place: Path, out: Path, steps: int) -> int:
    """Start the run in a child process and return its id, which exits with 1 if the run fails."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        Upgrade(recipe(place, steps), out, lambda progress: None).run()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise SystemExit(f"a run that was not killed left with {status}")


def where(out: Path) -> str:
    """Return the step of the run that a kill fell into."""
    if (out / "pipeline").is_dir():
        return "after the export"
    if any((out / "checkpoints").glob("stage2-*.done")) or read_metrics(out / "metrics.jsonl")[-1:] == []:
        return "before the first step"
    stage = read_metrics(out / "metrics.jsonl")[-1]["stage"]
    if stage == "stage1" and (out / "checkpoints" / "stage1.done").is_file():
        return "cache"
    return stage


def contents(out: Path) -> dict:
    """Everything that must be equal, flat."""
    files = {
        "vae": load_file(out / "vae" / "diffusion_pytorch_model.safetensors"),
        "upgrade": load_file(out / "upgrade.safetensors"),
        "transformer": load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"),
    }
    flat: dict = {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}

    def walk(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                walk(f"{path}/{number}", inner)
        else:
            flat[path] = value

    for stage in ("stage1", "stage2"):
        walk(stage, load_checkpoint(sorted((out / "checkpoints").glob(f"{stage}-0*"))[-1]))
    for record in read_metrics(out / "metrics.jsonl"):
        record.pop("images_per_second")
        walk(f"metrics/{record['stage']}/{record['step']}", record)
    flat["metrics"] = len(read_metrics(out / "metrics.jsonl"))
    return flat


def differences(one: dict, two: dict) -> list[str]:
    odd = sorted(one.keys() ^ two.keys())
    for name in one.keys() & two.keys():
        a, b = one[name], two[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        if not same:
            odd.append(name)
    return odd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    quiet()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tiny_base(place / "base")
        pictures(place / "pictures")
        began = time.perf_counter()
        finish(start(place, place / "never-killed", arguments.steps))
        duration = time.perf_counter() - began
        wanted = contents(place / "never-killed")
        print(f"never killed: {duration:.1f} s, {len(wanted)} values to compare")
        kills, runs, unequal, places = 0, 0, 0, Counter()
        while kills < arguments.kills:
            runs += 1
            out = place / f"killed-{runs}"
            while True:
                child = start(place, out, arguments.steps)
                if kills == arguments.kills:
                    finish(child)
                    break
                time.sleep(moments.uniform(0, duration / 2))
                if os.waitpid(child, os.WNOHANG) != (0, 0):
                    break  # it had come to its end
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                places[where(out)] += 1
            odd = differences(wanted, contents(out))
            unequal += bool(odd)
            print(f"run {runs}: {'equal to the bit' if not odd else f'{len(odd)} values differ, first {odd[0]}'}")
        print(f"{kills} kills in {runs} runs, {runs - unequal} of {runs} runs bit-identical to the one never killed")
        print("killed in: " + ", ".join(f"{where} {count}" for where, count in places.most_common()))
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
