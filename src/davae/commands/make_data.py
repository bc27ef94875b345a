"""`davae make-data`: the fine-tuning set that the base model draws itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.options import (
    GUIDANCE,
    STEPS,
    BatchSize,
    Compile,
    Guidance,
    Offload,
    Precision,
    Seed,
    Steps,
    sampling_options,
)
from davae.commands.progress import counted_progress, show_place


def make_data(
    model: Annotated[str, typer.Option(help="The base: a pipeline or run folder, `micro`, or a hub id.")],
    prompts: Annotated[
        Path, typer.Option(help="A prompt file: .txt (one a line), .tsv, .csv, .jsonl, .json, .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; the same command again draws what is missing.")],
    num: Annotated[int | None, typer.Option(min=1, help="Images; by default one a prompt.")] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own by default.")] = None,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    seed: Seed = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 1000,
    format: Annotated[Literal["png", "jpg"], typer.Option(help="jpg: quality 95, a quarter of the size.")] = "png",
    dtype: Precision = "float32",
    offload: Offload = "off",
    compile: Compile = "off",
    batch_size: BatchSize = 8,
) -> None:
    """Draw a training set with the base model at its native resolution (paper, Sec. 4), as WebDataset shards.

    Each sample keeps its prompt, seed and settings. `accelerate launch` shares the shards.

    `davae make-data --model micro --prompts prompts.txt --out data/own --num 1000 --resolution 128`

    `davae upgrade micro --data data/own`
    """
    from davae.sample.make_data import draw_training_set

    options = sampling_options(locals())
    with counted_progress("images") as on_image:
        missing = draw_training_set(
            model, prompts, out, options, num=num, shard_size=shard_size, image_format=format, on_image=on_image
        )
    show_place(f"{out}: other processes are still drawing {missing} shards" if missing else out)
