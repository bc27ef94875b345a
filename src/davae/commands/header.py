"""Header of `davae upgrade` and its steps: the work to come, its duration, and how to stop."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from davae.console import show_lines
from davae.dataset.encoding import run_precision
from davae.durations import duration
from davae.files.atomic import free_space
from davae.plan.expected import Expected, expect, is_short, measured_speed
from davae.plan.phase_sizes import short_prompt
from davae.pretrained.placement import own_device
from davae.recipes import Recipe
from davae.recipes.hardware import GIB
from davae.recipes.stages import POLISH
from davae.runs.status import PhaseStatus, read_status
from davae.tasks.base_model import BaseModel
from davae.train.distributed import launched
from davae.train.run_folder import is_done

STAGES = {"stage1": "stage 1", POLISH: "polish", "stage2": "stage 2"}
# what a verb trains of a recipe's trainings, and the step after which it has nothing left to do
TRAINS = {
    "upgrade": ("stage1", POLISH, "stage2"),
    "train-vae": ("stage1",),
    "cache-latents": ("stage1",),
    "train-dit": ("stage1", POLISH, "stage2"),
}
LAST = {"upgrade": "report", "train-vae": "stage1", "cache-latents": "cache", "train-dit": "stage2"}


def show_start(recipe: Recipe, folder: Path, verb: str) -> dict[str, float]:
    """Show what a run is about to do; return the seconds expected of each stage, nothing where that is not estimated.

    A run that is done, and one that is over in moments, is not estimated.

    Args:
        recipe: the recipe of the run.
        folder: its folder.
        verb: `upgrade`, `train-vae`, `cache-latents` or `train-dit`.
    """
    if is_done(folder, recipe, LAST[verb]):
        return {}
    expected = None
    if not is_short(recipe):
        base = BaseModel.of(recipe)
        speed = measured_speed(start_device(), run_precision(recipe.run), launched()[1])
        expected = expect(recipe, base.shapes, speed, short_prompt(base))
    show_lines(
        f"davae {verb} {recipe.name}", start_lines(recipe, folder, verb, expected, device_name(), free_space(folder))
    )
    if expected is None:
        return {}
    return {name: expected.seconds[name] for name in TRAINS[verb] if name in expected.seconds}


def start_lines(
    recipe: Recipe, folder: Path, verb: str, expected: Expected | None, device: str, free: int
) -> list[tuple[str, str]]:
    """Return the lines of the header, (label, text) each.

    Args:
        expected: estimates, None where they are not made.
        device: what computes, in words.
        free: bytes that the folder's disk has left.
    """
    stages = [(name, settings) for name, settings in recipe.trainings.items() if name in TRAINS[verb]]
    steps = [f"{STAGES[n]}: {s.max_steps:,} of {s.batch_size * s.accumulation:,} images" for n, s in stages]
    sources = list(dict.fromkeys((recipe.stage1_data.source, recipe.stage2_data.source)))
    lines = [
        ("base", f"{recipe.base.name}, {recipe.base.resolution} to {recipe.resolution} pixels"),
        ("device", device),
        ("data", ", ".join(sources)),
        ("folder", f"{folder} ({folder_state(folder, recipe)})"),
        ("steps", "; ".join(steps)),
    ]
    if expected is not None:
        seconds = [expected.seconds[name] for name, _ in stages]
        parts = [f"{STAGES[name]} {duration(s)}" for (name, _), s in zip(stages, seconds, strict=True)]
        lines.append(
            (
                "time",
                f"very roughly {duration(sum(seconds))} of training here ({', '.join(parts)}), from FLOPs; the latent cache"
                " and the report come on top. The display measures the time left",
            )
        )
        disk = f"about {expected.disk / GIB:.1f} GiB and the latent cache; {free / GIB:.0f} GiB are free"
        if expected.disk > free:
            disk += ". This does not fit: use another disk for --out, or lower run.keep_checkpoints"
        lines.append(("disk", disk))
    again = f"davae {verb} ... --out {folder}"
    lines.append(
        ("stop", f"Ctrl-C saves and stops; the same command goes on ({again}). State: davae status {folder}")
    )
    return lines


def folder_state(folder: Path, recipe: Recipe) -> str:
    """Return in words whether a run folder is new, and where its run is with this recipe's steps otherwise."""
    if not (folder / "recipe.yaml").is_file():
        return "new"
    status = read_status(folder, recipe)
    if status.next is None:
        return "done"
    following = next(place for place, phase in enumerate(status.phases) if not phase.done)
    known = [phase for phase in status.phases[: following + 1] if phase.done or phase.step]
    return f"goes on: {', '.join(map(phase_state, known))}" if known else "begun"


def phase_state(phase: PhaseStatus) -> str:
    """Return one phase's state in words."""
    name = STAGES.get(phase.name, phase.name)
    if phase.done or phase.steps is None:
        return f"{name} {'done' if phase.done else 'open'}"
    return f"{name} at step {phase.step:,} of {phase.steps:,}"


def start_device() -> torch.device:
    """Return the device of this process without starting a process group, which is the training's to start."""
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if launched()[1] == 1:
        return own_device()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local)


def device_name() -> str:
    """Return what computes, in words."""
    device, processes = start_device(), launched()[1]
    if device.type != "cuda":
        found = f"{device.type.upper()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
        return f"{found}{' (no GPU found)' if device.type == 'cpu' else ''}"
    about = torch.cuda.get_device_properties(device)
    return f"{processes} x {about.name}, {about.total_memory / GIB:.0f} GiB each"
