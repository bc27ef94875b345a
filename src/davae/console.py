"""Output for a person: progress on standard error, tables on standard output."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from davae.durations import TimeLeft, duration

if TYPE_CHECKING:  # they load torch
    from davae.train.loop import Observer
    from davae.train.loop import Progress as Step

logger = logging.getLogger(__name__)
console = Console()
status = Console(stderr=True)

NAMES = {
    "stage1": "stage 1: detail VAE",
    "stage1.polish": "polish: decoder",
    "stage2": "stage 2: transformer",
    "vae": "base autoencoder",
    "align.embedder": "align: embedder",
    "align.head": "align: head",
    "dit": "base transformer",
    "network": "super-resolution",
    "cache": "latent cache",
    "latents": "latent cache",
    "captions": "text cache",
    "report": "report",
}
WHOLE = "whole run"
SHOWN = ("loss_base", "loss_detail", "l1", "align", "unexplained")


def log_handler() -> RichHandler:
    return RichHandler(console=status, show_path=False, show_time=False)


def quiet_model_libraries() -> None:
    """Import diffusers and transformers, and let them write errors alone."""
    import diffusers
    import transformers

    for logger in (diffusers.utils.logging, transformers.utils.logging):
        logger.set_verbosity_error()
        logger.disable_progress_bar()


def show_lines(title: str, lines: list[tuple[str, str]]) -> None:
    """Show short facts on standard error and keep them in the run's log, except with `-q`.

    Args:
        title: the first line.
        lines: (label, text) of each further line.
    """
    if logging.getLogger("davae").isEnabledFor(logging.INFO):
        logger.info("%s\n%s", title, "\n".join(f"  {name:<7} {text}" for name, text in lines))


@contextmanager
def progress_display(expected: Mapping[str, float] | None = None) -> Iterator[Observer]:
    """Yield an observer that draws a line a task: done, time left, images/s, losses.

    It draws nothing with `-q`.

    Args:
        expected: seconds of the phases of a whole run, where they are estimated; a further line shows the time left of all.
    """
    if logging.getLogger("davae").level > logging.INFO:
        yield lambda step: None
        return
    bars = Progress(
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=status,
    )
    rows: dict[str, Any] = {}
    whole = TimeLeft(expected or {})

    def observe(step: Step) -> None:
        if step.task not in rows:
            rows[step.task] = bars.add_task(NAMES.get(step.task, step.task), total=step.max_steps, note="")
        losses = [f"{name.removeprefix('loss_')} {step.values[name]:.3f}" for name in SHOWN if name in step.values]
        speed = [f"{step.images_per_second:.0f} images/s"] if step.images_per_second else []
        bars.update(rows[step.task], completed=step.step, total=step.max_steps, note="  ".join(speed + losses))
        whole.observe(step.task, step.step, step.max_steps)
        left = whole.seconds if expected else None
        if left and WHOLE not in rows:
            rows[WHOLE] = bars.add_task(WHOLE, total=None, note="")
        if WHOLE in rows:  # gone while a phase without an estimate runs, and at the end
            note = f"about {duration(left)} left of all trainings" if left else ""
            bars.update(rows[WHOLE], visible=bool(left), note=note)

    with bars:
        yield observe


def table(title: str, columns: list[str], rows: list[list[Any]], right: bool = True) -> None:
    """Print a table, whose cells are never read as markup and never cut.

    Where words and numbers need more than the width, a terminal gets the rows one below the other, and a file or a pipe
    gets the table at its full width.

    Args:
        title: line above the table.
        columns: names; all "" for a table without a line of names.
        rows: cells.
        right: whether all but the first column are aligned as numbers are.
    """
    texts = list(zip(columns, *([str(cell) for cell in row] for row in rows), strict=True))  # of a column
    widths = [max(1, *(cell_len(word) for text in cells for word in text.split())) for cells in texts]
    whole = [max(map(cell_len, cells)) for cells in texts]
    room = console.width - sum(widths) - 3 * len(widths) - 1
    if room < 0 and console.is_terminal:
        _print_stacked(title, columns, rows)
        return
    widths = widths if room >= 0 else whole
    for _ in range(room):
        number = max(range(len(widths)), key=lambda n: whole[n] - widths[n])
        widths[number] += whole[number] > widths[number]
    view = Table(title=escape(title), title_justify="left", show_header=any(columns))
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        view.add_column(escape(column), justify="right" if number and right else "left", width=width)
    for row in rows:
        view.add_row(*[escape(str(cell)) for cell in row])
    (console if room >= 0 else Console(width=sum(widths) + 3 * len(widths) + 1, file=console.file)).print(view)


def _print_stacked(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows one below the other, a line for each cell."""
    console.print(title, style="italic", markup=False)
    for first, *cells in rows:
        view = Table(title=escape(f"{columns[0]} {first}".strip()), title_justify="left", box=None, show_header=False)
        for column, cell in zip(columns[1:], cells, strict=True):
            view.add_row(escape(column), escape(str(cell)))
        console.print(view)


SILENT = 2.0  # seconds in which nothing is shown of work that may be over at once


@contextmanager
def parts_display(title: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the part of some work that begins, once it took a while."""
    started = time.monotonic()
    if status.is_terminal:
        with status.status(title) as shown:
            yield lambda part: shown.update(f"{title}: {escape(part)}")
        return

    def show(part: str) -> None:
        if time.monotonic() - started > SILENT:
            status.print(f"{title}: {part}", markup=False, highlight=False)

    yield show


def show_phases(values: dict[str, Any], condition: str = "") -> None:
    """Print phases as one table, and what to change where one does not fit.

    Args:
        values: the JSON of a plan.
        condition: added to the title.
    """
    stated = f"{values['gpus']} x {values['gpu']} of {values['gpu_gib']:.0f} GiB"
    rows = [
        [
            phase["name"],
            f"{phase['device_gib']:.2f}",
            f"{phase['host_gib']:.1f}",
            f"{phase['machine_gib']:.1f}",
            f"{phase['disk_gib']:.2f}",
            f"{phase['hours']:.2f}",
            phase["batch_size"] or "-",
            "yes" if phase["fits"] else "NO",
        ]
        for phase in values["phases"]
    ]
    table(
        f"Phases on {stated}{condition}",
        ["", "GPU GiB", "process GiB", "machine GiB", "disk GiB", "hours", "at a time", "fits"],
        rows,
    )
    for phase in values["phases"]:
        if phase["remedy"]:
            console.print(f"{phase['name']}: does not fit {values['gpu']}; {phase['remedy']}.", markup=False)
