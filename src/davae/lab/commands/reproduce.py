"""`davae reproduce`: a table of the paper, from training to figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.options import AllowCommands, DryRun, Overrides


def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="table1 to table5, tableS2, tableS2a, fig3, fig4, figS3, figS5")
    ],
    scale: Annotated[
        Literal["micro", "gpu", "paper"],
        typer.Option(
            help="micro: real photos, two cores. gpu: the same, trained longer on one GPU. paper: ImageNet."
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
    """Train, measure and tabulate. Every run is kept under the hash of its recipe, and done once. Examples:

    `davae reproduce table5 --scale micro`

    `davae reproduce table5 --scale paper --dry-run`
    """
    from davae.console import console, progress_display, table
    from davae.errors import RecipeError
    from davae.lab import reproduce as reproduction
    from davae.lab.reproduce.tables import load_table

    if name in reproduction.FIGURES:
        given = [flag for flag, value in {"--row": row, "--seeds": seeds, "--markdown": markdown}.items() if value]
        if given:
            raise RecipeError(f"{given[0]} is for tables; {name} is drawn from one seed of rows of Table 5")
        if dry_run:
            part = "" if name in reproduction.TRAINED_WHOLE else "; of it the detail VAE and the cache alone"
            for job in reproduction.figure_jobs(name, scale, set or []):
                console.print(
                    f"# {job.row}: {reproduction.cost(job)}{part}\n{job.command}", markup=False, soft_wrap=True
                )
            return
        with progress_display() as observer:
            done = reproduction.figure(name, scale, set or [], out, results / name, observer)
        console.print(f"{done}", markup=False)
        return
    wanted = reproduction.jobs(name, scale, seeds, set or [], row)
    if markdown:
        console.print(reproduction.markdown(*reproduction.table_rows(wanted, results)), markup=False, soft_wrap=True)
        return
    missing = reproduction.missing_parts(wanted) if scale == "paper" else []
    plans = [job for job in wanted if isinstance(job, reproduction.PlannedJob)]
    if dry_run or missing or plans:
        for job in wanted:
            state = "done" if reproduction.finished(job, results) else reproduction.cost(job)
            title = job.row if job in plans else f"{job.row}, seed {job.seed}"
            notes = "".join(f"\n# {note}" for note in job.notes) if isinstance(job, reproduction.PlannedJob) else ""
            console.print(f"# {title}: {state}{notes}\n{job.command}", markup=False, soft_wrap=True)
        for note in load_table(name).notes if plans else ():
            console.print(f"Note: {note}.", markup=False, soft_wrap=True)
        if missing:
            console.print(f"Not run here: {'; '.join(missing)}.", markup=False, soft_wrap=True)
        elif plans:
            console.print("These commands are for you to run; `davae reproduce` printed them.", markup=False)
        return
    for job in wanted:
        with progress_display() as observer:
            reproduction.run_job(job, out, results, observer)
    shown = load_table(name)
    if shown.throughput:
        with progress_display() as observer:
            reproduction.measure_speed(wanted, out, results, observer)
    table(f"{shown.title}\nThe paper: {shown.claim}", *reproduction.table_rows(wanted, results))
