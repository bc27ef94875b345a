"""Progress of a verb while it works, and its results at the end."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from davae.commands.options import write_json

logger = logging.getLogger(__name__)


@contextmanager
def counted_progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the work that is done and of all work, which draws a bar named `task`."""
    from davae.console import progress_display
    from davae.train.loop import Progress

    with progress_display() as observer:
        yield lambda done, total: observer(Progress(task, done, total, 0.0))


def show_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to the file of `--json`, where one is given, and print them."""
    from davae.console import console

    write_json(path, figures)
    console.print_json(data=figures)


def next_steps(folder: Path) -> tuple[str, str]:
    """Return in two sentences what to do with a finished upgrade."""
    place = shlex.quote(str(folder))
    return f"Draw with it: davae sample {place} PROMPT", f"Publish it: davae export {place} --out FOLDER"


def show_hint(*sentences: str) -> None:
    """Show sentences on standard error, a line each, except with `-q`."""
    for sentence in sentences:
        logger.info("%s", sentence)


def show_place(place: object) -> None:
    """Print the path of a verb's result, or a sentence about it."""
    from davae.console import console

    console.print(f"{place}", markup=False)
