"""The table that finished runs make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from davae.lab.reproduce.job import Job
from davae.lab.reproduce.runs import finished
from davae.lab.reproduce.speed import speeds

SHOWN = (  # key, heading, decimals
    ("speed.tokens", "tokens", 0),
    ("speed.images_per_second", "images/s", 2),
    ("generation.fd_lite0", "FD-lite0", 2),
    ("generation.fid", "FID", 2),
    ("generation.precision_lite0", "precision", 3),
    ("generation.precision", "precision", 3),
    ("reconstruction.psnr", "PSNR, dB", 2),
    ("reconstruction.ssim", "SSIM", 4),
    ("reconstruction.lite0", "perceptual", 4),
    ("training.loss_base", "base loss", 3),
    ("training.loss_detail", "detail loss", 3),
    ("training.loss", "loss", 3),
)


def spread(values: list[float], decimals: int) -> str:
    """`mean ± standard deviation` over seeds; the mean alone where there is one, or where nothing varies."""
    text = f"{mean(values):.{decimals}f}"
    return text if len(set(values)) < 2 or not decimals else f"{text} ± {stdev(values):.{decimals}f}"


def table_rows(wanted: Sequence[Job], results: Path) -> tuple[list[str], list[list[str]]]:
    """(headings, a line a row) of what has been run: mean and spread over seeds, and how many there are."""
    done: dict[str, list[dict[str, Any]]] = {job.row: [] for job in wanted}
    timed = (speeds(wanted, results) or {"rows": {}})["rows"]
    for job in wanted:
        figures = finished(job, results)
        if figures is not None:
            done[job.row].append(figures | {"speed": timed.get(job.row, {})})
    seen = [f for rows in done.values() for f in rows]
    shown = [s for s in SHOWN if any(look_up(f, s[0]) is not None for f in seen)]
    lines = []
    for row, runs in done.items():
        cells = [[value for f in runs if (value := look_up(f, key)) is not None] for key, _, _ in shown]
        lines.append(
            [row, *(spread(v, s[2]) if v else "-" for v, s in zip(cells, shown, strict=True)), str(len(runs))]
        )
    return ["", *(heading for _, heading, _ in shown), "seeds"], lines


def look_up(figures: dict[str, Any], path: str) -> float | None:
    section, key = path.split(".")
    return figures.get(section, {}).get(key)


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """The table for a document."""
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines)) + "\n"
