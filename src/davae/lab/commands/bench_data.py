"""`davae bench cache | data | scale | growth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.commands.options import AllowCommands, Json, Overrides, Source
from davae.lab.commands.bench import show, upgrade_recipe

Name = Annotated[str, typer.Argument(metavar="[RECIPE]", help="An upgrade recipe; the default trains no stage 1.")]
Out = Annotated[Path, typer.Option(help="Run folder; its detail VAE and cache are made once.")]
EMBEDDED = ["init=micro-upgraded"]  # the embedded upgrade's detail VAE instead of stage 1


def _run(recipe: str, out: Path, data: str | None, overrides: list[str] | None):
    """A run of the recipe up to its detail VAE."""
    from davae.runs.upgrade import Upgrade

    chosen = [*(EMBEDDED if recipe == "micro" else []), *(overrides or [])]
    run = Upgrade(upgrade_recipe(recipe, chosen, data), out, lambda progress: None)
    run.train_vae()
    return run


def cache_encoding(
    recipe: Name = "micro",
    out: Out = Path("runs/bench"),
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
    json: Json = None,
) -> None:
    """Encoding throughput and size of the latent cache.

    `davae bench cache --set cache.variants=4`
    """
    from davae.lab.bench.data import cache_speed

    show(json, cache_speed(_run(recipe, out, data, set)))


def data_wait(
    recipe: Name = "micro",
    out: Out = Path("runs/bench"),
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of stage 2.")] = 20,
    json: Json = None,
) -> None:
    """Share of a cached stage 2 step that waits for its data.

    `davae bench data --steps 20`
    """
    from davae.lab.bench.data import step_speed

    run = _run(recipe, out, data, set)
    run.cache_latents()
    show(json, step_speed(run, steps))


def scale(
    items: Annotated[
        list[int] | None, typer.Option(min=1, help="Cached latents; may be repeated. 10^3 to 10^6 unless given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items of a batch.")] = 64,
    batches: Annotated[int, typer.Option(min=3, help="Read in the order of training.")] = 500,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
    json: Json = None,
) -> None:
    """Start-up, memory and reading speed of a latent cache by its size, on synthetic latents in a temporary folder.

    `davae bench scale --items 1000 --items 1000000`
    """
    from davae.lab.bench.scale import bench_scale

    figures = bench_scale(
        items or [10**n for n in range(3, 7)], batch_size=batch_size, batches=batches, num_workers=num_workers
    )
    show(json, figures)


def growth(
    recipe: Name = "micro",
    size: Annotated[
        list[int] | None, typer.Option(min=8, help="Pixels of the base's images; may be repeated. 64, 32, 128.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images a step, of all processes; may be repeated. 8, 2, 32.")
    ] = None,
    processes: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. 1, 2.")] = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps of each stage, a third of which warms up.")] = 9,
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
    json: Json = None,
) -> None:
    """How each stage grows with image size, batch and processes, one at a time; the first value is the others' own.

    `davae bench growth micro --size 64 --size 128 --batch 8 --processes 1 --processes 2`
    """
    from davae.lab.bench.growth import bench_growth

    figures = bench_growth(
        upgrade_recipe(recipe, set or [], data),
        sizes=size or [64, 32, 128],
        batches=batch or [8, 2, 32],
        processes=processes or [1, 2],
        steps=steps,
    )
    show(json, figures)
