"""Measurements that need a GPU, the most valuable first, in at most eight minutes.

    .venv/bin/python benchmarks/gpu.py --out docs/results/bench/gpu.json

Each part runs in a process of its own, which frees the device and cannot take the others with it. The file is written again
after every part: whatever ends the run, the parts before it are kept. `--tiny` runs every part at sizes for a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

BUDGET = 480.0  # seconds of all parts


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: its key in the file.
        seconds: its share of the budget, at most.
        measure: called with `tiny`, in a process of its own.
    """

    name: str
    seconds: float
    measure: Callable[[bool], dict[str, Any]]


# -- parts -------------------------------------------------------------------------------------------------------------


def picture(resolution: int, batch: int, tiny: bool) -> dict[str, Any]:
    """Time whole images of SD3.5 Medium at true width, native and upgraded, eager and recorded.

    Weights are random.
    """
    import diffusers
    import torch

    from davae import DetailVAE, expand_transformer
    from davae.device import record_passes
    from davae.lab.bench.tokens import random_transformer
    from davae.pretrained.placement import own_device
    from davae.pretrained.shapes import read_shapes
    from davae.zoo import resolve

    shapes = read_shapes(resolve("micro" if tiny else "sd35-medium"))
    device, dtype = own_device(), torch.float32 if tiny else torch.bfloat16
    config = shapes.transformer_config
    native = random_transformer(shapes, config["num_layers"], dtype).to(device)
    vae = diffusers.AutoencoderKL.from_config(shapes.vae_config).to(device, dtype)
    models = {"native": (native, vae)}
    models["upgraded"] = expand_transformer(native, shapes.channels), DetailVAE.from_base(vae, shapes.channels)
    steps, repeats = (2, 1) if tiny else (28, 2)
    embeds = torch.randn(batch, 333, config["joint_attention_dim"], device=device, dtype=dtype)
    pooled = torch.randn(batch, config["pooled_projection_dim"], device=device, dtype=dtype)
    found: dict[str, Any] = {"resolution": resolution, "batch": batch, "steps": steps, "passes": "two a step, guided"}
    for name, (transformer, autoencoder) in models.items():
        parts = {f"text_encoder{n}": None for n in ("", "_2", "_3")} | {
            f"tokenizer{n}": None for n in ("", "_2", "_3")
        }
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder, **parts)  # type: ignore[arg-type]
        pipeline.set_progress_bar_config(disable=True)
        draw = partial(
            pipeline,
            prompt_embeds=embeds, negative_prompt_embeds=embeds, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled, height=resolution, width=resolution, num_inference_steps=steps,
            guidance_scale=4.0, output_type="pt",
        )  # fmt: skip
        found[f"{name}_eager_seconds"] = timed(draw, repeats)
        if not tiny:  # on a CPU it would compile for minutes
            record_passes(transformer)
            found[f"{name}_recorded_seconds"] = timed(draw, repeats)
    for way in ("eager",) if tiny else ("eager", "recorded"):
        found[f"{way}_ratio"] = found[f"native_{way}_seconds"] / found[f"upgraded_{way}_seconds"]
    return found


def timed(draw: Callable[[], Any], repeats: int) -> float:
    """Return the shortest time of a call after one that warms up, device included."""
    from davae.evaluate.throughput import synchronise

    seconds = []
    for _ in range(repeats + 1):
        synchronise()
        started = time.perf_counter()
        draw()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def against_plain(stage: int, tiny: bool) -> dict[str, Any]:
    """Time a step of a stage against the plain implementation, at a batch that fills a GPU."""
    from davae.lab.bench.stages import bench_stage1, bench_stage2

    batch = 2 if tiny else (64, 512)[stage - 1]
    recipe = upgrade_recipe([f"stage{stage}.batch_size={batch}", f"stage{stage}.accumulation=1", *small(tiny)])
    bench = bench_stage1 if stage == 1 else bench_stage2
    return {"wanted": (1.5, 1.3)[stage - 1], **bench(recipe, steps=1 if tiny else 4, repeats=1 if tiny else 2)}


def text_training(precision: str, tiny: bool) -> dict[str, Any]:
    """Train a LoRA for 50 steps, and return whether losses are finite, and memory against plan."""
    from davae.plan.dry_run import plan
    from davae.runs.upgrade import Upgrade
    from davae.train.run_folder import read_metrics

    steps = 2 if tiny else 50
    changes = ["stage1.max_steps=2", f"stage2.max_steps={steps}", "stage2.warmup_steps=1", "stage2.lora.rank=16"]
    recipe = upgrade_recipe(
        [*changes, f"run.mixed_precision={'no' if tiny else precision}", "run.log_every=1", *small(tiny)]
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        started = time.perf_counter()
        Upgrade(recipe, out, lambda progress: None).run()
        seconds = time.perf_counter() - started
        records = [record for record in read_metrics(out / "metrics.jsonl") if record["stage"] == "stage2"]
        lines = (out / "timing.jsonl").read_text(encoding="utf-8").splitlines()
        timings = [json.loads(line) for line in lines]
    memory = {stage: max(t["memory_gib"] for t in timings if t["stage"] == stage) for stage in ("stage1", "stage2")}
    return {
        "precision": precision,
        "steps": len(records),
        "finite": all(math.isfinite(record["loss"]) for record in records),
        "skipped": records[-1]["skipped"],
        "loss_first_and_last": [records[0]["loss"], records[-1]["loss"]],
        "seconds": seconds,
        "memory_gib": memory,
        "planned": plan(recipe).figures,
    }


def tokens(model: str, resolution: int, batch: int, helpers: list[str], tiny: bool) -> dict[str, Any]:
    """Time a pass of a transformer, native and upgraded, with each helper, against its bound."""
    import torch

    from davae.lab.bench.tokens import bench_tokens
    from davae.pretrained.shapes import read_shapes
    from davae.zoo import resolve

    shapes = read_shapes(resolve(model))
    return bench_tokens(
        shapes,
        resolution=2 * shapes.vae_factor * shapes.patch_size * 2 if tiny else resolution,
        scale=2,
        detail_channels=shapes.channels,
        blocks=1 if tiny else 8,
        repeats=1 if tiny else 10,
        batch=1 if tiny else batch,
        helpers=[] if tiny else helpers,
        dtype=torch.float32 if tiny else torch.bfloat16,
    )


def upgrade_recipe(changes: list[str]) -> Any:
    """Return the recipe `micro` with values changed."""
    from davae.lab.commands.bench import upgrade_recipe as changed

    return changed("micro", changes)


def small(tiny: bool) -> list[str]:
    """Return changes of a recipe for a CPU."""
    if not tiny:
        return []
    return ["data.limit=16", "stage1.batch_size=2", "stage2.batch_size=2", "stage1.crop=64", "stage1.gan_start=1"]


PARTS = (
    Part("picture of SD3.5 Medium, 2048 px", 75, partial(picture, 2048, 1)),
    Part("picture of SD3.5 Medium, 1024 px", 50, partial(picture, 1024, 1)),
    Part("4 pictures of SD3.5 Medium, 1024 px", 50, partial(picture, 1024, 4)),
    Part("stage 2 against plain", 40, partial(against_plain, 2)),
    Part("stage 1 against plain", 50, partial(against_plain, 1)),
    Part("text model, bf16", 40, partial(text_training, "bf16")),
    Part("text model, fp16", 40, partial(text_training, "fp16")),
    Part("4 pictures of SD3.5 Medium, 2048 px", 60, partial(picture, 2048, 4)),
    Part("LightningDiT-XL", 25, partial(tokens, "lightningdit-xl", 512, 16, ["compiled"])),
    Part("int8", 25, partial(tokens, "sd35-medium", 1024, 4, ["int8+compiled"])),
    Part("fp8 weights", 25, partial(tokens, "sd35-medium", 1024, 4, ["fp8"])),
)
TINY_PIXELS = {2048: 128, 1024: 64}


# -- running them ------------------------------------------------------------------------------------------------------


def run_part(part: Part, command: list[str], seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, and return its figures or the reason for none."""
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return {**json.loads(lines[-1]), "seconds_of_part": round(time.perf_counter() - started, 1)}


def run(
    parts: tuple[Part, ...], command: Callable[[Part], list[str]], out: Path, budget: float, about: dict[str, Any]
) -> dict[str, Any]:
    """Run parts in their order while the budget lasts, and write all figures after each."""
    started, found = time.perf_counter(), {**about, "parts": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = budget - (time.perf_counter() - started)
        if left < 1:
            found["parts"][part.name] = {"error": "no time was left"}
        else:
            found["parts"][part.name] = run_part(part, command(part), min(left, part.seconds))
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def main() -> None:
    """Run all parts, or one of them where its number is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: shows that every part runs")
    parser.add_argument("--part", type=int, help="one part, by its number; prints its figures")
    arguments = parser.parse_args()
    if arguments.part is not None:
        measure = PARTS[arguments.part].measure
        if arguments.tiny and isinstance(measure, partial) and measure.func is picture:
            measure = partial(picture, TINY_PIXELS[measure.args[0]], measure.args[1])
        sys.stdout.write(json.dumps(measure(arguments.tiny), default=str) + "\n")
        return
    from davae.lab.bench.clock import machine

    tiny = ["--tiny"] if arguments.tiny else []

    def command(part: Part) -> list[str]:
        return [sys.executable, str(Path(__file__)), "--part", str(PARTS.index(part)), *tiny]

    budget = 20 * BUDGET if arguments.tiny else BUDGET
    found = run(PARTS, command, arguments.out, budget, {"machine": machine(), "tiny": arguments.tiny})
    errors = {name: figures["error"] for name, figures in found["parts"].items() if "error" in figures}
    sys.stdout.write(json.dumps({"written": str(arguments.out), "errors": errors}, indent=2) + "\n")
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
