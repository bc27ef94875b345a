"""`davae bench growth`: speed and memory of each stage by image size, batch and processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from davae.errors import RecipeError, RunError
from davae.files.atomic import atomic_text
from davae.files.reading import load_json
from davae.lab.bench.clock import machine
from davae.recipes import Recipe, load_recipe, permit_commands
from davae.runs.upgrade import Upgrade
from davae.train.run_folder import read_metrics

STAGES = ("stage1", "cache", "stage2")
CACHE_TIME = "cache-seconds.json"
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]


def short(recipe: Recipe, steps: int, batch: int) -> Recipe:
    """Return the recipe with few logged steps of `batch` images in both stages and one variant."""
    few = {"max_steps": steps, "batch_size": batch, "accumulation": 1}
    return recipe.model_copy(
        update={
            "stage1": recipe.stage1.model_copy(update=few),
            "stage2": recipe.stage2.model_copy(update={**few, "warmup_steps": 0}),
            "cache": recipe.cache.model_copy(update={"variants": 1, "batch_size": batch}),
            "run": recipe.run.model_copy(update={"log_every": 1, "checkpoint_every": steps}),
        }
    )


def run_stage(stage: str, recipe: Path, out: Path) -> None:
    """One stage in this process, or in this and its companions."""
    permit_commands(every=True)  # the process that wrote this recipe has checked it
    chosen = load_recipe(str(recipe), [])
    assert isinstance(chosen, Recipe)
    run = Upgrade(chosen, out, lambda progress: None)
    match stage:
        case "stage1":
            run.train_vae()
        case "cache":
            started = time.perf_counter()
            run.cache_latents()
            if PartialState().is_main_process:
                figures = {"seconds": time.perf_counter() - started, "items": len(run.train)}
                atomic_text(out / CACHE_TIME, json.dumps(figures))
        case "stage2":
            run.train_dit()
    run.folder.close()


def launch(stage: str, recipe: Path, out: Path, processes: int) -> None:
    """`run_stage` in fresh processes, one thread each.

    Raises:
        RunError: one of them failed; the last line that it said.
    """
    launcher = [*LAUNCH, str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "davae.lab.bench.growth", stage, str(recipe), str(out)]
    alone = {"ACCELERATE_USE_CPU": "true"} if processes > 1 and not torch.cuda.is_available() else {}
    done = subprocess.run(
        command, env={**os.environ, **alone, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RunError(f"{stage} with {processes} process(es) failed: {last or f'status {done.returncode}'}")


def stage_figures(records: Sequence[dict[str, Any]], stage: str) -> dict[str, float]:
    """Figures of a stage's steps, the first third of them left out as it warms up.

    Returns:
        `images_per_second`, `peak_gib` of the first process, and `late_over_early`: median seconds of the last third of the
        steps over those of the second, 1 where no step gets slower.
    """
    steps = [record for record in records if record["stage"] == stage]
    third = len(steps) // 3
    early, late = (
        statistics.median(step["seconds_step"] for step in part)
        for part in (steps[third : 2 * third], steps[2 * third :])
    )
    return {
        "images_per_second": statistics.median(step["images_per_second"] for step in steps[third:]),
        "peak_gib": steps[-1]["memory_gib"],
        "late_over_early": late / early,
    }


def measure(recipe: Recipe, processes: int) -> dict[str, Any]:
    """Both stages and the cache between them, each in fresh processes."""
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
        for stage in STAGES:
            launch(stage, path, out, processes)
        records = read_metrics(out / "timing.jsonl")
        cached = load_json((out / CACHE_TIME).read_text(encoding="utf-8"))
    return {
        "stage1": stage_figures(records, "stage1"),
        "cache": {"items": cached["items"], "items_per_second": cached["items"] / cached["seconds"]},
        "stage2": stage_figures(records, "stage2"),
    }


def bench_growth(
    recipe: Recipe,
    *,
    sizes: Sequence[int],
    batches: Sequence[int],
    processes: Sequence[int],
    steps: int,
) -> dict[str, Any]:
    """Return a row for each value of one variable, with the first value of the other two.

    Args:
        sizes: pixels of the base's pictures; an upgrade's are `recipe.scale` times as many.
        batches: pictures a step, of all processes together.

    Raises:
        RecipeError: fewer than three steps.
        RunError: a stage failed.
    """
    if steps < 3:
        raise RecipeError(f"--steps {steps}: at least 3, as the first third warms up")
    rows: list[dict[str, Any]] = []
    points = [(size, batches[0], processes[0]) for size in sizes]
    points += [(sizes[0], batch, processes[0]) for batch in batches[1:]]
    points += [(sizes[0], batches[0], count) for count in processes[1:]]
    for size, batch, count in points:
        base = recipe.base.model_copy(update={"resolution": size})
        chosen = short(recipe.model_copy(update={"base": base}), steps, batch)
        figures = measure(chosen, count)
        rows.append({"resolution": size * recipe.scale, "batch": batch, "processes": count, **figures})
    return {"recipe": recipe.name, "steps": steps, "threads_per_process": 1, "rows": rows, "machine": machine()}


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
