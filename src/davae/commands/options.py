"""Options that several subcommands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from davae.errors import RecipeError, RunError
from davae.recipes.commands import permit_commands, typed_commands

if TYPE_CHECKING:  # torch and pydantic's models are loaded on use: `--help` is instant
    from davae.recipes.sections import Data
    from davae.sample.open import SamplingOptions


def typed_source(text: str | None) -> str | None:
    """A command that the person typed may run."""
    permit_commands([text] if text else [])
    return text


def _typed_overrides(texts: list[str] | None) -> list[str] | None:
    permit_commands(typed_commands(texts or []))
    return texts


def _all_commands(allowed: bool) -> bool:
    permit_commands(every=allowed)
    return allowed


def _shipped(incomplete: str) -> list[str]:
    from davae.recipes import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name or a YAML file.",
        autocompletion=_shipped,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; the same command again resumes it.")]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        callback=typed_source,
        help="A folder of images, a WebDataset .tar, a Hugging Face dataset id.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", callback=_typed_overrides, help="Override one recipe value."),
]
AllowCommands = Annotated[
    bool,
    typer.Option(
        "--allow-commands",
        callback=_all_commands,
        help="Run the commands in the recipe (`pipe:`), whoever wrote it; without it only those that you type run.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost, and stop.")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option("--dtype", metavar="TYPE", help="Precision of the weights: float32, bfloat16 or float16."),
]
Offload = Annotated[
    Literal["off", "model", "sequential"],
    typer.Option(
        metavar="WHAT",
        help="off, model or sequential: keep each model, or each layer (slow), in main memory until the GPU needs it.",
    ),
]
Compile = Annotated[
    Literal["off", "blocks", "graphs"],
    typer.Option(
        metavar="WHAT",
        help="off, blocks or graphs: compile each repeated block, or record whole passes as CUDA graphs, which a single "
        "image on a fast GPU needs most. Takes up to minutes before the first image.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images drawn at a time.")]
# `verbs.ALIASES` has other names of these.
# One default for every verb that draws: the paper's (Sec. 4), and that of a recipe's `sampling`.
STEPS, GUIDANCE = 30, 2.5
Steps = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
Guidance = Annotated[
    float, typer.Option("--guidance", min=0.0, metavar="SCALE", help="Guidance scale; 1 or less turns it off.")
]
Seed = Annotated[int, typer.Option("--seed", min=-(2**62), max=2**62 - 1, help="Seed of the noise.")]


def _own_figures(path: Path | None) -> Path | None:
    """Refuse a `--json` file that is not davae's, before any work."""
    if path is not None:
        from davae.files.outputs import check_figures

        try:
            check_figures(path)
        except (RunError, OSError) as error:
            raise RecipeError(f"--json {path} cannot be written: {error}") from error
    return path


Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", callback=_own_figures)]


DATA = "Data"  # options of images, in a table of their own
CaptionKey = Annotated[
    str | None, typer.Option(rich_help_panel=DATA, help="Key of the .json next to an image that holds the caption.")
]
CaptionColumn = Annotated[
    str | None, typer.Option(rich_help_panel=DATA, help="Column of a table that holds captions.")
]
LabelKey = Annotated[str | None, typer.Option(rich_help_panel=DATA, help="Key of the .json with the class number.")]
LabelColumn = Annotated[
    str | None, typer.Option(rich_help_panel=DATA, help="Column of a table that holds class numbers.")
]
ImageColumn = Annotated[str | None, typer.Option(rich_help_panel=DATA, help="Column of a table that holds images.")]
Enlarge = Annotated[
    bool | None,
    typer.Option(
        "--enlarge/--no-enlarge",
        rich_help_panel=DATA,
        help="data.enlarge: prepare images as ADM does, which enlarges small ones.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.x=y", callback=_typed_overrides, help="Any option of a recipe's data."),
]


NAMED = ("caption_key", "caption_column", "label_key", "label_column", "image_column", "enlarge")  # options of `data`


def chosen_data(
    source: str, overrides: list[str] | None, given: Mapping[str, Any], start: Data | None = None
) -> Data:
    """Return a section `data` from a source, `--set data.x=y` and the options that have a name of their own.

    Args:
        source: images, as `--data` names them.
        overrides: texts `data.x=y`.
        given: parameters of the verb, of which those in `NAMED` are taken; None leaves an option as it is.
        start: section to change; the defaults, unless given.
    """
    from davae.recipes import load_data

    named = [f"data.{name}={json.dumps(given[name])}" for name in NAMED if given.get(name) is not None]
    return load_data(source, [*(overrides or []), *named], start)


def sampling_options(given: Mapping[str, Any]) -> SamplingOptions:
    """Return how a verb draws images: the parameters of the verb that are fields of `SamplingOptions`.

    Args:
        given: parameters of the verb; those that it lacks keep their defaults.
    """
    from davae.pretrained.placement import Placement
    from davae.sample.open import SamplingOptions

    placed = Placement(given.get("dtype", "float32"), given.get("offload", "off"), given.get("compile", "off"))
    own = {name: given[name] for name in ("steps", "guidance", "seed", "resolution", "batch_size") if name in given}
    return SamplingOptions(**own, placement=placed)


def summary_path(json_path: Path | None) -> Path | None:
    """Return where the summary of the data goes: next to the figures, `figures.data.json`.

    Raises:
        RecipeError: another file is there.
    """
    if json_path is None or (json_path.exists() and not json_path.is_file()):  # next to a device lies nothing
        return None
    from davae.dataset.look import check_summary

    path = json_path.with_suffix(".data.json")
    try:
        check_summary(path)
    except (RunError, OSError) as error:
        raise RecipeError(f"--json {json_path}: the summary of the data goes next to it: {error}") from error
    return path


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        from davae.files.outputs import write_figures

        try:
            write_figures(path, figures)
        except (RunError, OSError) as error:  # hours of measuring are not lost with the file
            sys.stderr.write(json.dumps(figures) + "\n")
            raise RecipeError(f"--json {path} cannot be written: {error}; the figures are above") from error
