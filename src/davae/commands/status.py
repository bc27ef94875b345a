"""`davae status`: state of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.commands.options import Json, write_json


def status(
    run: Annotated[Path, typer.Argument(help="A run folder: the --out of a training.")], json: Json = None
) -> None:
    """Show what a run has done, what comes next, the time left and its last losses. It may be running meanwhile.

    `davae status runs/micro`
    """
    from davae.commands.header import STAGES, phase_state
    from davae.commands.progress import next_steps
    from davae.console import console, table
    from davae.durations import duration
    from davae.runs.status import read_status, sparkline

    found = read_status(run)
    write_json(json, found.as_dict())
    rows = [
        [
            phase_state(phase),
            duration(phase.seconds) if phase.seconds is not None else "-",
            duration(phase.seconds_left) if phase.seconds_left else "-",
        ]
        for phase in found.phases
    ]
    table(f"{found.recipe} in {run}", ["", "time so far", "time left"], rows)
    for phase in found.phases:
        for name, values in phase.losses.items():
            label = f"{STAGES.get(phase.name, phase.name)}, {name}"
            console.print(f"{label:<24} {sparkline(values)} {values[-1]:.4g}", markup=False, highlight=False)
    running = f"process {found.process} works in it" if found.process is not None else "no process works in it here"
    following = f"next: {STAGES.get(found.next, found.next)}" if found.next is not None else "done"
    console.print(f"{following}; {running}", markup=False, highlight=False)
    if found.next is None and found.phases[-1].name == "report":  # of an upgrade
        console.print("\n".join(next_steps(run)), markup=False, highlight=False, soft_wrap=True)
