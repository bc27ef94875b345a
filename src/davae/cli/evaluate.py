"""`davae evaluate`: measure a model on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.cli.options import Json, write_json

evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model on pictures.")


@evaluate_app.command()
def reconstruction(
    vae: Annotated[str, typer.Option(help="A DetailVAE folder, a run folder, or a diffusers autoencoder folder.")],
    data: Annotated[str, typer.Option(help="Pictures, as `davae upgrade --data` takes them.")],
    resolution: Annotated[int | None, typer.Option(help="Pixels; the autoencoder's own by default.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="At most so many pictures.")] = None,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.99, help="Only this held-out share; 0 takes all.")] = 0.0,
    json: Json = None,
) -> None:
    """PSNR, SSIM and a perceptual distance. Example:

    `davae evaluate reconstruction --vae runs/micro/vae --data openmoji --held-out 0.1`
    """
    from davae.display import console
    from davae.measure import evaluate_reconstruction

    figures = evaluate_reconstruction(vae, data, resolution, num, held_out)
    write_json(json, figures)
    console.print_json(data=figures)


@evaluate_app.command()
def generation(
    pipeline: Annotated[str, typer.Option(help="A run or pipeline folder, `micro`, `micro-upgraded`, or a hub id.")],
    data: Annotated[str, typer.Option(help="Real pictures with captions.")],
    num: Annotated[int, typer.Option(min=2, help="Generated pictures.")] = 1000,
    resolution: Annotated[int | None, typer.Option(help="Pixels to generate; the pipeline's own by default.")] = None,
    compare_at: Annotated[
        int | None, typer.Option(help="Pixels to compare at; samples are enlarged bilinearly.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    guidance: Annotated[float, typer.Option(min=0.0)] = 2.5,
    seed: int = 0,
    held_in: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Only the training side of a split that holds out this share.")
    ] = 0.0,
    json: Json = None,
) -> None:
    """Frechet distance on EfficientNet-Lite0 features (FD-lite0) to real pictures, prompts from their captions.

    `davae evaluate generation --pipeline runs/micro --data openmoji --num 1000`
    """
    from davae.display import console, progress_display
    from davae.measure import evaluate_generation
    from davae.train.loop import Progress

    with progress_display() as observer:
        figures = evaluate_generation(
            pipeline,
            data,
            num=num,
            resolution=resolution,
            compare_at=compare_at,
            steps=steps,
            guidance=guidance,
            seed=seed,
            held_in=held_in,
            on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        )
    write_json(json, figures)
    console.print_json(data=figures)


@evaluate_app.command()
def samples(
    pipeline: Annotated[str, typer.Option(help="A class-conditional run or pipeline folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The .npz to write; its parts lie beside it until you remove them.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures: 50000 or 10000 in published tables.")] = 50000,
    labels: Annotated[
        Literal["balanced", "random"], typer.Option(help="Equal numbers a class, or drawn by seed.")
    ] = ("balanced"),
    steps: Annotated[int, typer.Option(min=1, help="Updates of the ODE.")] = 249,
    guidance: Annotated[float, typer.Option(min=0.0)] = 4.0,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Pictures in the ADM format (`arr_0` uint8) for the usual FID suites. Resumes; `accelerate launch` shares the work.

    `davae evaluate samples --pipeline lightningdit-xl --out samples.npz --num 50000`
    """
    from davae.display import console, progress_display
    from davae.measure import write_sample_file
    from davae.train.loop import Progress

    with progress_display() as observer:
        whole = write_sample_file(
            pipeline,
            out,
            num=num,
            labels=labels,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch_size=batch_size,
            on_part=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        )
    console.print(f"{out}" if whole else f"{out}: other processes are still drawing their parts", markup=False)
