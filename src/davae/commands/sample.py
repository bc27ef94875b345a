"""`davae sample`: images of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from davae.errors import RecipeError


def sample(
    run: Annotated[
        str,
        typer.Argument(help="A run or pipeline folder, `micro`, `clothing`, `NAME-upgraded`, or a hub id."),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; classes of a class model.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 4,
    seed: Seed = 0,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    negative_prompt: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="More prompts: .txt (one a line), .tsv, .csv, .jsonl, .json, .parquet.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of a square in pixels; the model's own by default.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels, with --width, instead of --resolution.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels, with --height.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA of the base, .safetensors; it is fitted to an upgraded model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the images.")] = None,
    dtype: Precision = "float32",
    offload: Offload = "off",
    compile: Compile = "off",
    batch_size: BatchSize = 4,
    preview: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between two previews of the base, in a sheet that grows up to 64 images."),
    ] = None,
) -> None:
    """Write images of prompts, and a grid of the first 64. Nothing is written over.

    `davae sample micro-upgraded "a red rose" --num 8 --seed 1`

    `davae sample runs/sd35 --prompt-file prompts.txt --num 1 --dtype bfloat16`
    """
    size = image_size(resolution, height, width)
    if not prompt and prompt_file is None:
        raise RecipeError('PROMPT: none given; add one, as "a red rose", or --prompt-file')
    from davae.sample.image_folder import draw_samples

    options = sampling_options({**locals(), "resolution": size})
    with counted_progress("sampling") as on_batch:
        done = draw_samples(
            run,
            prompt or [],
            options,
            prompt_file=prompt_file,
            folder=out,
            num=num,
            negative_prompt=negative_prompt,
            lora=lora,
            preview=preview,
            on_batch=on_batch,
        )
    show_place(done)


def image_size(resolution: int | None, height: int | None, width: int | None) -> int | tuple[int, int] | None:
    """Return a square's side, (height, width), or None for the model's own size.

    Raises:
        RecipeError: one of height and width alone, or both and a resolution.
    """
    if height is None and width is None:
        return resolution
    if resolution is not None:
        raise RecipeError("--resolution: it is a square's side; give it, or --height and --width")
    if height is None or width is None:
        given, other = ("--height", "--width") if width is None else ("--width", "--height")
        raise RecipeError(f"{given}: found without {other}; give both, or --resolution")
    return height if height == width else (height, width)
