"""Seconds of each phase of a run over all its starts: `times.json` in the run folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from davae.errors import RunError
from davae.files.atomic import atomic_text
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

TIMES = "times.json"
# in the order in which runs go through them
PHASES = (
    *("base", "vae", "align.embedder", "align.head", "dit", "network"),
    *("stage1", "cache", "stage1.polish", "stage2", "report"),
)


def read_times(folder: Path) -> dict[str, float]:
    """Return the seconds of each phase, nothing for a run of an earlier version."""
    times = _read(folder / TIMES)
    if base := _read(folder / "base" / TIMES):
        times["base"] = sum(base.values())
    return {name: times[name] for name in PHASES if name in times}


def _read(file: Path) -> dict[str, float]:
    try:
        values = load_json(file.read_bytes())
        return {str(name): float(seconds) for name, seconds in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, OverflowError):
        logger.warning("%s is damaged; the times of the phases before are not known any more", file)
        return {}


@contextmanager
def timed(folder: Path, phase: str) -> Iterator[None]:
    """Add the seconds inside to a phase's in the first process, also after an interruption."""
    from davae.train.distributed import is_main  # it loads torch, which those who only read times need not

    started = time.monotonic()
    try:
        yield
    finally:
        if is_main() and folder.is_dir():
            times = _read(folder / TIMES)
            times[phase] = round(times.get(phase, 0.0) + time.monotonic() - started, 3)
            try:
                atomic_text(folder / TIMES, json.dumps(times, indent=1) + "\n")
            except (RunError, OSError) as error:  # the run's own error, if any, is the one to show
                logger.warning("the times of the phases are not kept: %s", error)
