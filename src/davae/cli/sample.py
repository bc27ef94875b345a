"""`davae sample`: images of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import BatchSize, Compile, Offload, Precision


def sample(
    run: Annotated[str, typer.Argument(help="A run or pipeline folder, `micro`, `micro-upgraded`, or a hub id.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 4,
    seed: int = 0,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    guidance: Annotated[float, typer.Option(min=0.0)] = 4.0,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own size by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
    dtype: Precision = "float32",
    offload: Offload = "off",
    compile: Compile = "off",
    batch_size: BatchSize = 4,
) -> None:
    """Write pictures and a grid. Example: `davae sample runs/micro "a red rose" --num 8 --seed 1`"""
    from davae.display import console, progress_display
    from davae.drawing import sample_to_folder
    from davae.measure import open_model
    from davae.models.placement import Placement
    from davae.train.loop import Progress

    pipeline, default = open_model(run, Placement(dtype, offload, compile))
    with progress_display() as observer:
        done = sample_to_folder(
            pipeline,
            prompt,
            out or default,
            num=num,
            seed=seed,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
            batch_size=batch_size,
            on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        )
    console.print(f"{done}", markup=False)
