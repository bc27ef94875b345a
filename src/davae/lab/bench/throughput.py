"""`davae bench throughput`: images a second of one pipeline in batches, as in Tab. 3."""

from __future__ import annotations

from typing import Any

import torch

from davae.backbones.families import denoiser
from davae.evaluate.throughput import image_tokens
from davae.lab.bench.clock import gpu_rounds, machine, race
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions


def bench_throughput(
    pipeline: Any, prompt: str, *, resolution: int, batch: int, steps: int, guidance: float, repeats: int
) -> dict[str, Any]:
    """Time whole batches of one prompt: text encoders, every step, decoding.

    Returns:
        `images_per_second` (batch over the median), `batch_seconds`, `batch`, `tokens` of an image, `steps`,
        `guidance_scale`, `resolution`, `dtype` of the transformer, `peak_device_bytes` (None without an accelerator) and
        the machine.
    """
    options = SamplingOptions(steps, guidance, resolution=resolution, batch_size=batch)

    def draw() -> object:
        return generate(pipeline, [prompt] * batch, options)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = race({"batch": draw}, repeats, warmup=1 + gpu_rounds())["batch"]
    return {
        "images_per_second": batch / seconds.median,
        "batch_seconds": seconds.as_dict(),
        "batch": batch,
        "tokens": image_tokens(pipeline, resolution),
        "steps": steps,
        "guidance_scale": guidance,
        "resolution": resolution,
        "dtype": str(denoiser(pipeline).dtype).removeprefix("torch."),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "machine": machine(),
    }
