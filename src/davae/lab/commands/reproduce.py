"""`davae reproduce`: a table of the paper or of our own, from training to figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.options import AllowCommands, DryRun, Overrides

Scale = Literal["micro", "gpu", "clothing", "paper"]


def reproduce(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="table1 to table5, tableS2, tableS2a, fig3, fig4, figS3, figS5; gains"),
    ],
    scale: Annotated[
        Scale,
        typer.Option(
            metavar="SCALE",
            help="micro: real photos, two cores. gpu: the same, trained longer on one GPU. clothing: photos of clothes in "
            "a pretrained latent space. paper: ImageNet.",
        ),
    ] = "micro",
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="Only this row, by its name; may be given again. All by default."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of the transformer's training; the scale's own by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs; the same command resumes.")] = Path(
        "runs/reproduce"
    ),
    results: Annotated[
        Path, typer.Option(help="Folder of finished runs' figures, one JSON a run; those found are not run again.")
    ] = Path("docs/results/reproduce"),
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of what has been run, and stop.")
    ] = False,
    set: Overrides = None,
    dry_run: DryRun = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Train, measure and tabulate. Every run is kept under the hash of its recipe, and done once.

    `davae reproduce table5 --scale micro`

    `davae reproduce table5 --scale paper --dry-run`
    """
    from davae.lab.reproduce.figures import FIGURES

    if name in FIGURES:
        given = [flag for flag, value in {"--row": row, "--seeds": seeds, "--markdown": markdown}.items() if value]
        _figure(name, scale, set or [], out, results, given, dry_run)
    else:
        _table(name, scale, seeds, set or [], row, out, results, markdown, dry_run)


def _figure(
    name: str, scale: Scale, overrides: list[str], out: Path, results: Path, given: list[str], dry_run: bool
) -> None:
    """Draw a figure, or print the commands of its runs.

    Args:
        given: options of the command line that only tables have.
    """
    from davae.console import console, progress_display
    from davae.errors import RecipeError
    from davae.lab.reproduce import runs
    from davae.lab.reproduce.figures import TRAINED_WHOLE, figure, figure_jobs

    if given:
        raise RecipeError(f"{given[0]} is for tables; {name} is drawn from one seed of rows of Table 5")
    if dry_run:
        part = "" if name in TRAINED_WHOLE else ": the detail VAE and the cache alone"
        for job in figure_jobs(name, scale, overrides):
            console.print(f"# {job.row}{part}\n{job.command}", markup=False, soft_wrap=True)
        return
    runs.check_files(figure_jobs(name, scale, overrides))
    with progress_display() as observer:
        done = figure(name, scale, overrides, out, results / name, observer)
    console.print(f"{done}", markup=False)


def _table(
    name: str,
    scale: Scale,
    seeds: int | None,
    overrides: list[str],
    rows: list[str] | None,
    out: Path,
    results: Path,
    markdown: bool,
    dry_run: bool,
) -> None:
    """Run the jobs of a table that are not done yet and print it, or print the commands alone.

    Commands alone are printed for rows that davae does not run itself, and at the paper's scale without a GPU.
    """
    import torch

    from davae.console import console, progress_display, table
    from davae.lab.reproduce import choose, runs, tabulate
    from davae.lab.reproduce.job import PlannedJob
    from davae.lab.reproduce.tables import load_table

    jobs = choose.jobs(name, scale, seeds, overrides, rows)
    if markdown:
        console.print(tabulate.markdown(*tabulate.table_rows(jobs, results)), markup=False, soft_wrap=True)
        return
    planned = any(isinstance(job, PlannedJob) for job in jobs)
    if dry_run or planned or (scale == "paper" and not torch.cuda.is_available()):
        for job in jobs:
            title = job.row if isinstance(job, PlannedJob) else f"{job.row}, seed {job.seed}"
            state = ": done" if runs.finished(job, results) else ""
            console.print(f"# {title}{state}\n{job.command}", markup=False, soft_wrap=True)
        if scale == "paper":
            console.print("docs/paper-scale.md lists what these commands read and cost.", markup=False)
        return
    runs.check_files([job for job in jobs if runs.finished(job, results) is None])
    for job in jobs:
        with progress_display() as observer:
            runs.run_job(job, out, results, observer)
    shown = load_table(name)
    if shown.throughput and runs.timed_jobs(jobs):
        with progress_display() as observer:
            runs.measure_speed(jobs, out, results, observer)
    claim = f"{'The question' if shown.ours else 'The paper'}: {shown.claim}"
    table(f"{shown.title}\n{claim}", *tabulate.table_rows(jobs, results))
