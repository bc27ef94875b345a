"""`davae evaluate enlarging`: an upgrade against filters and super-resolution networks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from davae.commands.options import (
    BatchSize,
    Json,
    Offload,
    Options,
    Precision,
    Seed,
    chosen_data,
    sampling_options,
    summary_path,
    write_json,
)


def enlarging(
    model: Annotated[str, typer.Option(help="An upgrade: a run or pipeline folder, `NAME-upgraded`, or a hub id.")],
    data: Annotated[str, typer.Option(help="Images of at least the size that the model draws.")],
    num: Annotated[int, typer.Option(min=4, help="Images.")] = 100,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.99, help="Only this held-out share; 0 takes all.")] = 0.1,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Filters, weights of networks, other upgrades, or commands; bicubic and lanczos by default."
        ),
    ] = None,
    captions: Annotated[bool, typer.Option(help="Give the upgrade the images' captions.")] = True,
    strength: Annotated[float, typer.Option(min=0.0, max=1.0, help="As `davae upscale`.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns it off.")] = 1.0,
    seed: Seed = 0,
    faithful: Annotated[bool, typer.Option(help="As `davae upscale`.")] = True,
    lpips: Annotated[Literal["alex", "vgg"] | None, typer.Option(help="LPIPS too, on this network.")] = None,
    lpips_weights: Annotated[
        str | None, typer.Option(help="Its safetensors (trunk and heads), where torchvision cannot download.")
    ] = None,
    patch_size: Annotated[int, typer.Option(min=8, max=4096, help="Side of the crops of the patch distance.")] = 64,
    batch_size: BatchSize = 8,
    dtype: Precision = "float32",
    offload: Offload = "off",
    set: Options = None,
    json: Json = None,
) -> None:
    """Reduce images, enlarge them by the upgrade and by other methods, and compare with the originals.

    `davae evaluate enlarging --model micro-upgraded --data openmoji --method lanczos --method runs/sr/network.safetensors`
    """
    from davae.evaluate.enlarging import evaluate_enlarging

    figures = evaluate_enlarging(
        model,
        chosen_data(data, set, {}),
        sampling_options(locals()),
        num=num,
        held_out=held_out,
        methods=method or ("bicubic", "lanczos"),
        captions=captions,
        strength=strength,
        faithful=faithful,
        lpips=lpips,
        lpips_weights=lpips_weights,
        patch_size=patch_size,
        summary=summary_path(json),
    )
    write_json(json, figures)
    _show(figures)


def _show(figures: dict[str, Any]) -> None:
    """Print a line a measure, because all measures side by side need more than 80 columns."""
    from davae.console import console, table

    rows = figures["rows"]
    names = [name for name in next(iter(rows.values())) if name not in ("images", "patch_size")]
    shown = [
        [name, *(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for row in rows.values())]
        for name in names
    ]
    table(f"{figures['images']} images from {figures['from']} to {figures['to']} pixels", ["", *rows], shown)
    console.print("reduced_psnr: the reduced result against the input.", markup=False)
