"""Figures of a run's report.json, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from davae.errors import ModelError
from davae.files.reading import read_object

SPEEDS = ("transformer_seconds", "whole_seconds", "speedup_over_native", "tokens")
KINDS = {"speedup_over_native": (int, float, type(None))}  # None where the base cannot draw the upgrade's size
SCORES = ("psnr", "ssim", "lite0")


def read_report(folder: Path) -> dict[str, Any]:
    """Return the figures of a run's `report.json`, which may be an empty object.

    Raises:
        ModelError: a file that is damaged, or lacks what davae writes there.
    """
    file = folder / "report.json"
    figures = read_object(file)
    facts = figures.get("facts")
    machine = isinstance(facts, dict) and isinstance(facts.get("machine"), str)
    if figures and not (
        machine and _rows(figures.get("speed"), SPEEDS) and _rows(figures.get("reconstruction"), SCORES)
    ):
        raise ModelError(
            f"{file} is damaged: figures are missing; delete it and run the `davae upgrade` command of its run again"
        )
    return figures


def _rows(rows: Any, numbers: tuple[str, ...]) -> bool:
    """Return whether a value is a list of named rows with these numbers."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and all(isinstance(row.get(name, ""), KINDS.get(name, (int, float))) for name in numbers)
        for row in rows
    )
