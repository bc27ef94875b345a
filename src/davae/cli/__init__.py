"""The command line: one subcommand a verb. Exit status 0 done, 2 bad input, 130 interrupted after saving."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from davae.cli.analyze import analyze_app
from davae.cli.app import app as app_verb
from davae.cli.bench_data import cache, data_wait, growth, scale
from davae.cli.bench_models import bench_app
from davae.cli.convert import convert_app
from davae.cli.data import data
from davae.cli.evaluate import evaluate_app
from davae.cli.export import apply, export, push
from davae.cli.inspect import inspect
from davae.cli.make_data import make_data
from davae.cli.options import (
    AllowCommands,
    BatchSize,
    Compile,
    DryRun,
    Json,
    Name,
    Offload,
    Out,
    Overrides,
    Precision,
    Source,
    write_json,
)
from davae.cli.reproduce import reproduce
from davae.cli.start import start
from davae.cli.verbs import Verbs
from davae.errors import DavaeError, Interrupted
from davae.recipes import (
    AnyRecipe,
    BaseRecipe,
    Recipe,
    RecipeError,
    SuperResolutionRecipe,
    check_commands,
    dump_recipe,
    load_recipe,
    shipped_recipes,
)
from davae.train.signals import check_stop, leave_on_signal, stop_on_signal

Kind = TypeVar("Kind", Recipe, BaseRecipe, SuperResolutionRecipe)

app = Verbs(
    invoke_without_command=True,
    callback=start,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Twice the resolution at the same token count for pretrained latent diffusion models (DA-VAE).\n\n"
    "Start with `davae upgrade micro --out runs/micro`: it upgrades the embedded model and writes a report.",
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(analyze_app, name="analyze")
app.add_typer(convert_app, name="convert")
bench_app.command()(cache)
bench_app.command("data")(data_wait)
bench_app.command()(scale)
bench_app.command()(growth)
app.add_typer(bench_app, name="bench")
app.command()(data)
app.command()(inspect)
app.command()(reproduce)
app.command()(export)
app.command()(apply)
app.command()(push)
app.command("make-data")(make_data)
app.command("app")(app_verb)


def _load(name: str, data: str | None, overrides: list[str] | None) -> AnyRecipe:
    """`--data` is an override like any other."""
    extra = [f"data.source={json.dumps(data)}"] if data else []
    recipe = load_recipe(name, [*(overrides or []), *extra])
    check_commands(recipe)
    return recipe


VERBS = {Recipe: "upgrade", BaseRecipe: "train-base", SuperResolutionRecipe: "train-sr"}


def _recipe(kind: type[Kind], name: str, data: str | None, overrides: list[str] | None) -> Kind:
    """A recipe of the kind that a verb works on; RecipeError names the verb for any other."""
    recipe = _load(name, data, overrides)
    if not isinstance(recipe, kind):
        raise RecipeError(f"recipe '{recipe.name}' is for another verb; use `davae {VERBS[type(recipe)]} {name}`")
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
    recipe = _recipe(Recipe, name, data, overrides)
    if json_file is not None and not dry:
        raise RecipeError("--json: it takes the figures of a dry run; add --dry-run, or read report.json of the run")
    from davae.display import console, progress_display, show_phases, table
    from davae.train.plan import plan
    from davae.train.ranks import is_main
    from davae.train.upgrade import Upgrade
    from davae.workflow import upgrade

    if dry:
        console.print(dump_recipe(recipe), markup=False, highlight=False)
        found = plan(recipe)
        write_json(json_file, found.as_dict())
        table(
            "What it takes",
            ["", recipe.name],
            [[key.replace("_", " "), value] for key, value in found.figures.items()],
        )
        show_phases(found)
        for note in found.notes:
            console.print(f"Note: {note}.", markup=False)
        return
    folder = out or Path("runs") / recipe.name
    with progress_display() as observer:
        run = Upgrade(recipe, folder, observer, stage1=stage1)
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
                done = upgrade(run, observer)
            check_stop(str(folder))
    if not is_main():  # the first process of a launch made the report and reports
        return
    if verb == "upgrade":
        _show_report(folder)
    console.print(f"{done}", markup=False)


def _show_report(folder: Path) -> None:
    from davae.display import table

    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    table(
        "Tokens and time of one picture",
        ["model", "image tokens", "transformer, s", "whole, s", "against native"],
        [
            [row["name"], row["tokens"], f"{row['transformer_seconds']:.3f}", f"{row['whole_seconds']:.3f}",
             f"{row['speedup_over_native']:.2f}x"]
            for row in figures["speed"]
        ],
    )  # fmt: skip
    kind = "Training" if figures.get("reconstruction_images") == "training" else "Held-out"
    table(
        f"{kind} pictures, encoded and decoded",
        ["decoder input", "PSNR, dB", "SSIM", "perceptual"],
        [
            [row["name"], f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['lite0']:.4f}"]
            for row in figures["reconstruction"]
        ],
    )


@app.command()
def upgrade(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
    json: Json = None,
) -> None:
    """Upgrade a pretrained model: stage 1, latent cache, stage 2, export, report.

    Finished steps are skipped when the command is run again. Examples:

    `davae upgrade micro --out runs/micro`

    `davae upgrade micro --data my_pictures/ --out runs/mine --set stage2.max_steps=300`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "upgrade", json_file=json)


@app.command("train-vae")
def train_vae(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Stage 1 only: the detail-aligned VAE. Example: `davae train-vae micro --out runs/micro`"""
    _run_upgrade(recipe, out, data, set, dry_run, "train-vae")


@app.command("cache-latents")
def cache_latents(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Up to the latent cache. Example: `davae cache-latents micro --out runs/micro`"""
    _run_upgrade(recipe, out, data, set, dry_run, "cache-latents")


@app.command("train-dit")
def train_dit(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
    stage1: Annotated[
        Path | None, typer.Option(help="Another run's folder: its detail VAE and cache serve here too.")
    ] = None,
) -> None:
    """Up to the exported pipeline, without the report. Examples:

    `davae train-dit micro --out runs/micro`

    `davae train-dit micro --out runs/other --stage1 runs/micro --set stage2.lr=0.0005`
    """
    _run_upgrade(recipe, out, data, set, dry_run, "train-dit", stage1)


@app.command("train-base")
def train_base(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
) -> None:
    """Pretrain a small base model from scratch. Example: `davae train-base micro-base --out runs/micro-base`"""
    resolved = _recipe(BaseRecipe, recipe, data, set)
    from davae.display import console, progress_display
    from davae.train.base_run import train_base as run

    with progress_display() as observer:
        done = run(resolved, out or Path("runs") / resolved.name, observer)
    console.print(f"{done}", markup=False)


@app.command("train-sr")
def train_sr(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
) -> None:
    """Train a super-resolution network, the baseline of Tab. S2: weights for `davae evaluate generation --upscale`.

    `davae train-sr imagenette128-sr --out runs/sr`
    """
    resolved = _recipe(SuperResolutionRecipe, recipe, data, set)
    from davae.display import console, progress_display
    from davae.train.super_resolution import train_super_resolution as run

    with progress_display() as observer:
        done = run(resolved, out or Path("runs") / resolved.name, observer)
    console.print(f"{done}", markup=False)


@app.command()
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


@app.command()
def recipes(json: Json = None) -> None:
    """List the shipped recipes. Example: `davae recipes --json recipes.json`"""
    from rich.console import Console

    shown = {
        name: next((line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")), "")
        for name, text in shipped_recipes().items()
    }
    write_json(json, shown)
    width = max(map(len, shown))
    for name, line in shown.items():
        Console().print(f"{name:<{width}}  {line}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: turns the errors that are a user's to mend into one line and exit status 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a second process
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if len(sys.argv) > 1 and not {"--help", "-h", "--version", "recipes"} & set(sys.argv):
            _quiet_libraries()
        with nullcontext() if "app" in sys.argv[1:2] else leave_on_signal():  # the page's server has its own handlers
            app()
    except Interrupted as error:
        sys.stderr.write(f"davae: {error}\n")
        sys.exit(130)
    except DavaeError as error:
        sys.stderr.write(f"davae: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the output has ended, as `davae recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (OSError, MemoryError) as error:
        sys.stderr.write(f"davae: {explain(error)}\n")
        sys.exit(2)


def explain(error: OSError | MemoryError) -> str:
    """Return one line on a file that the system refuses, or on memory that it does not have."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, resolution or batch"
    place = f"{error.filename}: " if error.filename is not None else ""
    return " ".join(f"{place}{error.strerror or error}".split())[:500]


def _quiet_libraries() -> None:
    """davae's own messages on standard error; libraries only when something is wrong."""
    import diffusers
    import transformers

    from davae.display import log_handler

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_handler()], force=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, nothing a user can mend
    for name in ("accelerate", "diffusers", "transformers", "huggingface_hub", "httpx", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
