"""What `davae sample` and `davae evaluate samples` do: images of a model into files that davae may write over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from davae.data.pictures import grid
from davae.files import saving
from davae.measure import check_classes, model_places, open_model
from davae.models.classes import class_count, goes_by_class
from davae.models.pipeline import ModelError
from davae.models.placement import FULL, Placement
from davae.output_files import check_image, check_place, save_image
from davae.sample.adm import Labels, class_schedule, write_samples
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate


def sample_to_folder(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    *,
    num: int,
    seed: int,
    steps: int,
    guidance: float,
    resolution: int | None,
    batch_size: int,
    on_batch: Callable[[int, int], None],
) -> Path:
    """Write `num` pictures of every prompt and one grid, a row a prompt; returns the grid's path.

    Raises:
        ModelError: a class that the model lacks, a picture that is not finite; those before it are written.
        RunError: files of these names are there, and davae did not write them.
    """
    check_classes(pipeline, prompts)
    wanted = [prompt for prompt in prompts for _ in range(num)]
    sheet = folder / f"grid-seed{seed}.png"
    places = [folder / sample_name(prompt, seed, number) for number, prompt in enumerate(wanted)]
    for place in (*places, sheet):
        check_image(place)
    pictures: list[Any] = []
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "seed": seed, "batch_size": batch_size}
        drawn = generate(pipeline, part, resolution=resolution, first=start, **options)
        for place, picture in zip(places[start:], drawn, strict=False):
            save_image(picture, place)
        pictures += drawn
        on_batch(len(pictures), len(wanted))
    save_image(grid(pictures, num), sheet)
    return sheet


def sample_name(prompt: str, seed: int, number: int) -> str:
    """Return the file name of one picture of `davae sample`."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40] or "picture"
    return f"{words}-seed{seed}-{number:03d}.png"


def write_sample_file(
    pipeline: str,
    target: Path,
    *,
    num: int,
    labels: Labels,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    on_part: Callable[[int, int], None],
    placement: Placement = FULL,
) -> bool:
    """`davae evaluate samples`: whether the `.npz` is whole (False: other processes still draw their parts)."""
    check_place(target)
    weights = model_fingerprint(model_places(pipeline))
    model, _ = open_model(pipeline, placement)
    if not goes_by_class(model):
        raise ModelError(f"{pipeline} is no class-conditional model; sample files follow the ImageNet protocol")
    state = PartialState()
    schedule = class_schedule(num, class_count(model), labels, seed)

    def draw(classes: list[int], first: int) -> Tensor:
        prompts = [str(number) for number in classes]
        pictures = generate(
            model,
            prompts,
            output_type="pt",
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            first=first,
            batch_size=batch_size,
        )
        return torch.stack(pictures)

    settings = {"labels": labels, "steps": steps, "guidance": guidance, "seed": seed, **placement.changes}
    with saving(target):
        return write_samples(
            target,
            schedule,
            draw,
            settings={**settings, "weights": weights},
            about={"pipeline": pipeline},
            former={**settings, "pipeline": pipeline},
            rank=state.process_index,
            ranks=state.num_processes,
            on_part=on_part,
        )
