"""`davae upscale`: enlarge images with an upgraded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.commands.options import (
    GUIDANCE,
    STEPS,
    BatchSize,
    Guidance,
    Offload,
    Precision,
    Seed,
    Steps,
    sampling_options,
)
from davae.commands.progress import counted_progress, show_place


def upscale_verb(
    model: Annotated[str, typer.Argument(help="An upgrade: a run or pipeline folder, `NAME-upgraded`, or a hub id.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for PNG files of the same names; finished ones are kept.")],
    prompt: Annotated[
        str | None, typer.Option(help="What the images show; without it, the `.txt` next to each image.")
    ] = None,
    strength: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the steps in which the image itself may change; 0: none."),
    ] = 0.0,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    seed: Seed = 0,
    times: Annotated[int, typer.Option(min=1, max=4, help="How often to enlarge: 2 makes four times the size.")] = 1,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Side of a window in pixels of the result; the model's own size by default."),
    ] = None,
    faithful: Annotated[
        bool, typer.Option(help="Begin with the input's own detail, and correct the result by the input.")
    ] = True,
    batch_size: BatchSize = 4,
    dtype: Precision = "float32",
    offload: Offload = "off",
) -> None:
    """Enlarge images with an upgraded model, which draws the detail that they lack, guided by a prompt.

    `davae upscale micro-upgraded icons/ --out large --prompt "a red rose"`

    `davae upscale runs/mine photo.jpg --out large --times 2 --strength 0.2`
    """
    from davae.sample.fingerprint import model_fingerprint
    from davae.sample.open import model_places, open_model
    from davae.sample.upscale_files import find_images, upscale_files

    options = sampling_options(locals())
    jobs, weights = find_images(images, out, prompt), model_fingerprint(model_places(model))
    pipeline, _ = open_model(model, options.placement)
    with counted_progress("enlarging") as on_step:
        done = upscale_files(
            pipeline,
            jobs,
            out,
            options,
            weights=weights,
            strength=strength,
            times=times,
            window=window,
            faithful=faithful,
            on_step=on_step,
        )
    show_place(done)
