"""Checks of previews and enlarging on micro, and a LoRA to measure retention by.

python benchmarks/three_jobs.py checks --json docs/results/three-jobs/checks.json
python benchmarks/three_jobs.py photo photo.png --json docs/results/three-jobs/photo.json
python benchmarks/three_jobs.py lora lora.safetensors --norm 0.1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import davae
from davae.data.images import to_images
from davae.dataset.look import real_pictures
from davae.pretrained.shapes import token_side
from davae.sample.canvas import Canvas, WindowGrid
from davae.sample.open import open_model
from davae.vae.blocks import downsample


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the PSNR in dB of two images of one size."""
    error = (np.asarray(one, dtype=float) - np.asarray(other, dtype=float)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-10)))


def checks(steps: int) -> dict[str, Any]:
    """Return how two window grids and two batches agree, and a preview's cost."""
    pipeline, _ = open_model("micro-upgraded")
    pictures = real_pictures("openmoji", 128, 0.1, "held_out")
    large = to_images(pictures[(0, -1)]["image"][None])[0] if "image" in pictures[(0, -1)] else None
    assert large is not None
    wide, small = large.crop((8, 24, 120, 104)), to_images(downsample(pictures[(1, -1)]["image"][None], 2))[0]
    options = {"steps": steps, "guidance_scale": 1.0}
    grids = [davae.upscale(pipeline, wide, overlap=share, batch_size=8, **options)[0] for share in (0.25, 0.5)]
    alone = davae.upscale(pipeline, small, batch_size=1, **options)[0]
    among = davae.upscale(pipeline, [wide, small], batch_size=8, **options)[1]

    times: dict[str, list[float]] = {"step": [], "preview": []}
    shown = davae.preview(pipeline, every=1)
    last = time.perf_counter()

    def on_step(pipe: object, step: int, t: object, kwargs: dict) -> dict:
        nonlocal last
        began = time.perf_counter()
        times["step"].append(began - last)
        shown(pipe, step, t, kwargs)
        last = time.perf_counter()
        times["preview"].append(last - began)
        return kwargs

    pipeline("a red rose", height=128, width=128, num_inference_steps=12, guidance_scale=4.0, max_sequence_length=1,
             callback_on_step_end=on_step)  # fmt: skip
    figures = {
        "ratio_7x5": {"from": wide.size, "to": grids[0].size, "two_window_grids_psnr": psnr(*grids)},
        "batch_of_one_and_of_many": {"largest_difference": int(np.abs(np.int16(alone) - np.int16(among)).max())},
        "preview": {
            "median_step_seconds": float(np.median(times["step"][1:])),
            "median_preview_seconds": float(np.median(times["preview"][2:])),
        },
    }
    figures["preview"]["share"] = (
        figures["preview"]["median_preview_seconds"] / figures["preview"]["median_step_seconds"]
    )
    return {**figures, "skipped_calls": skipped(small)}


def skipped(image: Image.Image, steps: int = 30, repeats: int = 3) -> dict[str, Any]:
    """Return the seconds of an enlargement with skipped calls and with all, by model."""
    ignores, found = Canvas.ignores, {}
    for model, prompt in (("micro-upgraded", "a red rose"), ("clothing-upgraded", "dress")):
        pipeline, _ = open_model(model)
        seconds: dict[str, list[float]] = {"skipped": [], "all calls": []}
        for _ in range(repeats):
            for name, method in (("skipped", ignores), ("all calls", lambda *_: False)):
                Canvas.ignores = method
                began = time.perf_counter()
                davae.upscale(pipeline, image, prompt, steps=steps)
                seconds[name].append(time.perf_counter() - began)
        found[model] = {**seconds, "ratio": min(seconds["all calls"]) / min(seconds["skipped"])}
    Canvas.ignores = ignores
    return {"steps": steps, **found}


def steps_at_windows(image: Image.Image, lefts: Sequence[int], side: int) -> float:
    """Return the mean step between columns at the edges of windows, over that of all.

    Args:
        image: the result.
        lefts: columns where windows begin.
        side: of a window, pixels.
    """
    steps = np.abs(np.diff(np.asarray(image, dtype=float), axis=1)).mean((0, 2))  # (W-1,)
    edges = [edge - 1 for left in lefts for edge in (left, left + side) if 0 < edge < image.width]
    return float(steps[edges].mean() / steps.mean())


def photo(file: Path, steps: int, side: int = 224) -> dict[str, Any]:
    """Return how two window grids agree on a photo's centre, and its steps at their edges."""
    pipeline, _ = open_model("micro-upgraded")
    image = Image.open(file).convert("RGB")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    one, other = (
        davae.upscale(pipeline, centre, overlap=share, steps=steps, guidance_scale=1.0, batch_size=8, faithful=False)[
            0
        ]
        for share in (0.25, 0.4)
    )
    grid = WindowGrid.over(*(2 * side // 8 for _ in range(2)), 128 // 8, 0.25, token_side(pipeline) // 8)
    lefts = [8 * start for start in grid.lefts]
    return {
        "from": centre.size,
        "to": one.size,
        "faithful": False,
        "windows": len(grid),
        "two_window_grids_psnr": psnr(one, other),
        "steps_at_window_edges": steps_at_windows(one, lefts, 128),
        "of_lanczos_there": steps_at_windows(centre.resize(one.size, Image.Resampling.LANCZOS), lefts, 128),
    }


def random_lora(file: Path, norm: float, rank: int = 8) -> None:
    """Write a random LoRA of micro's attention: |B A| = norm |W| in each layer (Frobenius)."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, layer in open_model("micro")[0].transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".attn." in name:
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            up *= norm * float(layer.weight.detach().norm() / (up @ down).norm())
            state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(state, file, {"format": "pt", "davae": davae.__version__})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["checks", "photo", "lora"])
    parser.add_argument("file", type=Path, nargs="?", help="the photo, or the LoRA to write")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--norm", type=float, default=0.1)
    given = parser.parse_args()
    if given.check == "lora":
        random_lora(given.file, given.norm)
        return
    figures = checks(given.steps) if given.check == "checks" else photo(given.file, given.steps)
    command = " ".join(["python benchmarks/three_jobs.py", given.check, *([given.file.name] if given.file else [])])
    about = {"command": f"{command} --json {given.json}", "steps": given.steps, "threads": torch.get_num_threads()}
    given.json.write_text(json.dumps(about | figures, indent=2) + "\n\n")


if __name__ == "__main__":
    main()
