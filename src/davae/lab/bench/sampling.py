"""`davae bench sample` and `guidance`: whole pictures, and what else makes them faster."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from davae.backbones.families import denoiser
from davae.backbones.lightning_dit import LightningDiT
from davae.data.images import to_tensor
from davae.lab.bench.clock import Spread, gpu_rounds, machine, race, ratio
from davae.lab.bench.helpers import helped, multiplies
from davae.lab.bench.vae import psnr_in_range
from davae.losses.flow_matching import shift_timestep
from davae.pretrained.placement import own_device
from davae.sample.generate import generate
from davae.sample.ode import euler, euler_ode, time_grid
from davae.sample.open import SamplingOptions


def bench_sample(
    native: Any,
    upgraded: Any,
    options: SamplingOptions,
    *,
    prompt: str,
    repeats: int,
    helpers: list[str],
) -> dict[str, Any]:
    """One picture by the base at its native `resolution` and by its upgrade, with each helper.

    `multiplies`: the helper's speed-up on the upgraded model relative to its speed-up on the native one; 1 means that it
    multiplies with the token saving. `psnr`: of its picture to the one without it.
    """
    pipelines = {"native": native, "upgraded": upgraded}
    seconds: dict[tuple[str, str], list[float]] = {}
    pictures: dict[tuple[str, str], Tensor] = {}
    for helper in helpers:
        for name, pipeline in pipelines.items():
            with helped(denoiser(pipeline), helper):
                for turn in range(repeats + 1):
                    started = time.perf_counter()
                    drawn = generate(pipeline, [prompt], options)[0]
                    if turn:
                        seconds.setdefault((helper, name), []).append(time.perf_counter() - started)
                pictures[helper, name] = to_tensor(drawn)
    rows = {}
    for helper in helpers:
        times = {name: Spread.of(seconds[helper, name]) for name in pipelines}
        alone = {name: Spread.of(seconds["plain", name]) for name in pipelines}
        rows[helper] = {
            **{f"{name}_seconds": times[name].as_dict() for name in pipelines},
            "upgraded_over_native": ratio(times["native"], times["upgraded"]),
            "over_plain_native": ratio(alone["native"], times["upgraded"]),
            "multiplies": multiplies(alone, times),
            "psnr": psnr_in_range(pictures[helper, "upgraded"], pictures["plain", "upgraded"], 2.0)
            if helper != "plain"
            else None,
        }
    return {
        "resolution": options.resolution,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "rows": rows,
        "machine": machine(),
    }


@torch.no_grad()
def fully_guided(
    model: Any, noise: Tensor, labels: Tensor, num_steps: int, cfg_scale: float, interval_start: float, shift: float
) -> Tensor:
    """Sample with both halves of the batch in every step, the second unused without guidance."""
    null = torch.full_like(labels, int(model.config["num_classes"]))

    def field(x: Tensor, t: float) -> Tensor:
        times = torch.full((2 * len(x),), t, device=x.device)
        both = model(torch.cat([x, x]), times, torch.cat([labels, null]), return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        scale = cfg_scale if t >= interval_start else 1.0
        return unconditional + scale * (conditional - unconditional)

    return euler(field, noise, time_grid(num_steps, shift))


def bench_guidance(
    *, hidden_size: int, depth: int, grid: int, channels: int, num_steps: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Compare the paper's guided sampler (Sec. 4) with the full computation, and return figures.

    The paper guides with CFG 4.0 in the interval from 0.2, with shift 0.3.
    """
    torch.manual_seed(0)
    model = LightningDiT(
        input_size=grid, in_channels=channels, hidden_size=hidden_size, depth=depth, num_heads=hidden_size // 32
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval().to(device=own_device())  # type: ignore[call-overload]
    noise = torch.randn(batch, channels, grid, grid).to(model.device)
    labels = (torch.arange(batch) % 1000).to(model.device)
    scale, start, shift = 4.0, 0.2, 0.3
    results: dict[str, Tensor] = {}

    def ours() -> None:
        results["davae"] = euler_ode(
            model, noise, labels, num_steps, cfg_scale=scale, cfg_interval_start=start, timestep_shift=shift
        )

    def full() -> None:
        results["full"] = fully_guided(model, noise, labels, num_steps, scale, start, shift)

    times = race({"davae": ours, "full": full}, repeats, warmup=gpu_rounds())
    unguided = int((shift_timestep(torch.linspace(0, 1, num_steps), shift)[:-1] < start).sum())
    difference = float((results["davae"] - results["full"]).abs().max() / results["full"].abs().max())
    return {
        "num_steps": num_steps,
        "unguided_steps": unguided,
        "davae_seconds": times["davae"].as_dict(),
        "full_seconds": times["full"].as_dict(),
        "speedup": ratio(times["full"], times["davae"]),
        "bound": 2 * (num_steps - 1) / (2 * (num_steps - 1) - unguided),
        "largest_relative_difference": difference,
        "machine": machine(),
    }
