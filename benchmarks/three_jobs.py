"""Checks of previews and enlarging on micro: window grids, batches, the cost of a preview.

python benchmarks/three_jobs.py --json docs/results/three-jobs/checks.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import davae
from davae.data.images import to_images
from davae.dataset.look import real_pictures
from davae.sample.open import open_model
from davae.vae.blocks import downsample


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the PSNR in dB of two images of one size."""
    error = (np.asarray(one, dtype=float) - np.asarray(other, dtype=float)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-10)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
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
        "command": "python benchmarks/three_jobs.py --json docs/results/three-jobs/checks.json",
        "steps": steps,
        "threads": torch.get_num_threads(),
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
    path = parser.parse_args().json
    path.write_text(json.dumps(figures, indent=2) + "\n\n")


if __name__ == "__main__":
    main()
