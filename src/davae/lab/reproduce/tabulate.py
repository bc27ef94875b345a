"""Table of the figures of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from davae.lab.reproduce.job import Job
from davae.lab.reproduce.runs import finished, speeds

SHOWN = (  # key, heading, decimals
    ("speed.tokens", "tokens", 0),
    ("speed.images_per_second", "images/s", 2),
    ("generation.fd_lite0", "FD-lite0", 2),
    ("generation.fid", "FID", 2),
    ("generation.patch_fd_lite0", "patch FD-lite0", 2),
    ("generation.patch_fid", "patch FID", 2),
    ("generation.kid_lite0", "KID-lite0", 4),
    ("generation.kid", "KID", 4),
    ("generation.precision_lite0", "precision", 3),
    ("generation.precision", "precision", 3),
    ("generation.recall_lite0", "recall", 3),
    ("generation.recall", "recall", 3),
    ("reconstruction.psnr", "PSNR, dB", 2),
    ("reconstruction.ssim", "SSIM", 4),
    ("reconstruction.lite0", "perceptual", 4),
    ("training.loss_base", "base loss", 3),
    ("training.loss_detail", "detail loss", 3),
    ("training.loss", "loss", 3),
)


def mean_and_deviation(values: list[float], decimals: int) -> str:
    """Return `mean ± standard deviation`, or the mean alone for one seed or equal values.

    Args:
        values: one for each seed.
        decimals: of both numbers.
    """
    text = f"{mean(values):.{decimals}f}"
    return text if len(set(values)) < 2 or not decimals else f"{text} ± {stdev(values):.{decimals}f}"


def table_rows(jobs: Sequence[Job], results: Path) -> tuple[list[str], list[list[str]]]:
    """Return headings and a line for each row: means, deviations and the number of seeds.

    Args:
        jobs: of all rows of a table; those that have not been run are left out.
        results: folder of finished runs' figures.
    """
    done: dict[str, list[dict[str, Any]]] = {job.row: [] for job in jobs}
    timed = (speeds(jobs, results) or {"rows": {}})["rows"]
    for job in jobs:
        figures = finished(job, results)
        if figures is not None:
            done[job.row].append(figures | {"speed": timed.get(job.row, {})})
    seen = [f for rows in done.values() for f in rows]
    shown = [s for s in SHOWN if any(look_up(f, s[0]) is not None for f in seen)]
    lines = []
    for row, runs in done.items():
        cells = [[value for f in runs if (value := look_up(f, key)) is not None] for key, _, _ in shown]
        lines.append(
            [
                row,
                *(mean_and_deviation(v, s[2]) if v else "-" for v, s in zip(cells, shown, strict=True)),
                str(len(runs)),
            ]
        )
    return ["", *(heading for _, heading, _ in shown), "seeds"], lines


def look_up(figures: dict[str, Any], path: str) -> float | None:
    section, key = path.split(".")
    return figures.get(section, {}).get(key)


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """Return the table in Markdown.

    Args:
        headings, lines: of `table_rows`.
    """
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines)) + "\n"
