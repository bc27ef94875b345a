"""`davae upgrade` and its steps, `train-base`, `train-sr`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from davae.commands.options import AllowCommands, DryRun, Json, Name, Out, Overrides, Source, write_json
from davae.commands.progress import next_steps, show_hint, show_place
from davae.commands.verbosity import run_log
from davae.errors import RecipeError
from davae.train.signals import check_stop, stop_on_signal

if TYPE_CHECKING:  # pydantic's models are loaded on use: `--help` is instant
    from davae.recipes import AnyRecipe, BaseRecipe, Recipe, SuperResolutionRecipe

    Kind = TypeVar("Kind", Recipe, BaseRecipe, SuperResolutionRecipe)


def _load(name: str, data: str | None, overrides: list[str] | None) -> AnyRecipe:
    """`--data` is an override like any other."""
    from davae.recipes import check_commands, load_recipe

    extra = [f"data.source={json.dumps(data)}"] if data else []
    recipe = load_recipe(name, [*(overrides or []), *extra])
    check_commands(recipe)
    return recipe


VERBS = {"Recipe": "upgrade", "BaseRecipe": "train-base", "SuperResolutionRecipe": "train-sr"}


def read_typed(
    kind: type[Kind], name: str, data: str | None, overrides: list[str] | None, *, dry: bool = False
) -> Kind:
    """Return a recipe of the kind that a verb works on; a dry run needs none of its files.

    Raises:
        RecipeError: a recipe for another verb, which is named, or one whose files are not here.
    """
    recipe = _load(name, data, overrides)
    if not isinstance(recipe, kind):
        raise RecipeError(
            f"recipe '{recipe.name}' is for another verb; use `davae {VERBS[type(recipe).__name__]} {name}`"
        )
    from davae.recipes.places import check_places

    if not dry:
        check_places(recipe, name)
    return recipe


def _run_upgrade(
    name: str,
    out: Path | None,
    data: str | None,
    overrides: list[str] | None,
    dry: bool,
    verb: str,
    stage1: Path | None = None,
    json_file: Path | None = None,
) -> None:
    from davae.recipes import Recipe

    recipe = read_typed(Recipe, name, data, overrides, dry=dry)
    if json_file is not None and not dry:
        raise RecipeError("--json: it takes the figures of a dry run; add --dry-run, or read report.json of the run")
    from davae.commands.header import LAST, show_start
    from davae.console import progress_display
    from davae.runs.report import run_with_report
    from davae.runs.upgrade import Upgrade
    from davae.train.distributed import is_main, launched

    folder = out or Path("runs") / recipe.name
    if dry:
        _show_plan(recipe, folder, json_file, verb, stage1)
        return
    with ExitStack() as stack:
        log = stack.enter_context(run_log())
        observer = stack.enter_context(
            progress_display(show_start(recipe, folder, verb) if launched()[0] == 0 else {})
        )
        run = Upgrade(recipe, folder, observer, stage1=stage1)
        if is_main() and not run.folder.done(LAST[verb]):
            log.open(folder)
        with stop_on_signal(recipe.run.stop_signals):
            if verb == "train-vae":
                done = run.train_vae()
            elif verb == "cache-latents":
                run.check_data()
                run.train_vae()
                done = run.cache_latents()
            elif verb == "train-dit":
                run.check_data()
                done = run.run()
            else:
                done = run_with_report(run, observer)
            check_stop(str(folder))
    if not is_main():  # the first process of a launch made the report and reports
        return
    if verb == "upgrade":
        _show_report(folder)
        show_hint(*next_steps(folder))
    show_place(done)


def _show_plan(recipe: Recipe, folder: Path, json_file: Path | None, verb: str, stage1: Path | None) -> None:
    from davae.console import console, show_phases, table
    from davae.plan.dry_run import plan
    from davae.recipes import dump_recipe

    console.print(dump_recipe(recipe), markup=False, highlight=False)
    found = plan(recipe, folder, verb, stage1)
    write_json(json_file, found.as_dict())
    rows = [[key.replace("_", " ").replace("pictures", "images"), value] for key, value in found.figures.items()]
    table("What it takes", ["", recipe.name], rows)
    show_phases(found.as_dict())
    for note in found.notes:
        console.print(f"Note: {note}.", markup=False)


def _show_report(folder: Path) -> None:
    from davae.console import table
    from davae.publish.report_file import read_report

    figures = read_report(folder)
    table(
        "Tokens and time of one image",
        ["model", "image tokens", "transformer, s", "whole, s", "against native"],
        [
            [row["name"], row["tokens"], f"{row['transformer_seconds']:.3f}", f"{row['whole_seconds']:.3f}",
             f"{row['speedup_over_native']:.2f}x" if row["speedup_over_native"] is not None else "-"]
            for row in figures["speed"]
        ],
    )  # fmt: skip
    kind = "Training" if figures.get("reconstruction_images") == "training" else "Held-out"
    table(
        f"{kind} images, encoded and decoded",
        ["decoder input", "PSNR, dB", "SSIM", "perceptual"],
        [
            [row["name"], f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['lite0']:.4f}"]
            for row in figures["reconstruction"]
        ],
    )


def train(run: Callable[..., Path], recipe: AnyRecipe, out: Path | None) -> None:
    """Run a training that is not an upgrade, and print what it wrote."""
    from davae.console import progress_display

    with progress_display() as observer:
        done = run(recipe, out or Path("runs") / recipe.name, observer)
    show_place(done)


def upgrade_verb(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
    json: Json = None,
) -> None:
    """Upgrade a pretrained model: stage 1, latent cache, stage 2, export, report.

    Finished steps are skipped when the command is run again.

    `davae upgrade micro --out runs/micro`

    `davae upgrade micro --data my_images/ --out runs/mine --set stage2.max_steps=300`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "upgrade", json_file=json)


def train_vae(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Stage 1 only: the detail-aligned VAE.

    `davae train-vae micro --out runs/micro`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "train-vae")


def cache_latents(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Up to the latent cache.

    `davae cache-latents micro --out runs/micro`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "cache-latents")


def train_dit(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
    stage1: Annotated[
        Path | None, typer.Option(help="Another run's folder: its detail VAE, and its cache if it fits, serve here.")
    ] = None,
) -> None:
    """Up to the exported pipeline, without the report.

    `davae train-dit micro --out runs/micro`

    `davae train-dit micro --out runs/other --stage1 runs/micro --set stage2.lr=0.0005`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "train-dit", stage1)


def train_base_verb(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
) -> None:
    """Pretrain a small base model from scratch.

    `davae train-base micro-base --out runs/micro-base`
    """
    from davae.recipes import BaseRecipe

    resolved = read_typed(BaseRecipe, recipe, data, set)
    from davae.runs.train_base import train_base as run

    train(run, resolved, out)
