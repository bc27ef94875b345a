"""Images a second of a table's rows, timed in turns in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davae.data.latent_cache.key import fingerprint
from davae.errors import RecipeError
from davae.evaluate.throughput import Candidate, time_pictures
from davae.files.atomic import atomic_text, saving
from davae.files.reading import read_object
from davae.lab.bench.clock import machine
from davae.lab.reproduce.job import DrawnJob, EnlargedJob, Job, UpgradeJob
from davae.lab.reproduce.runs import trained_upscaler
from davae.train.loop import Observer


def measure_speed(wanted: Sequence[Job], out: Path, results: Path, observer: Observer) -> dict[str, Any]:
    """Time one picture of each row, with the table's steps and guidance, and keep the figures beside the rows'.

    Args:
        out: the folder of `run_job`: a trained row is timed with the weights that lie there, of whichever seed.

    Raises:
        RecipeError: the weights of a row are on another machine.
    """
    known = speeds(wanted, results)
    if known is not None:
        return known
    rows = timed_jobs(wanted)
    generation = settings(rows[0])
    figures = {
        "rows": time_pictures(
            [candidate(job, wanted, out, observer) for job in rows],
            generation["data"],
            steps=generation["steps"],
            guidance=generation["guidance"],
        ),
        "machine": machine(),
    }
    with saving(results):
        atomic_text(path_of(rows, results), json.dumps(figures, indent=2) + "\n")
    return figures


def speeds(wanted: Sequence[Job], results: Path) -> dict[str, Any] | None:
    """What `measure_speed` measured, here or elsewhere."""
    path = path_of(timed_jobs(wanted), results)
    return read_object(path) if path.is_file() else None


def timed_jobs(wanted: Sequence[Job]) -> list[Job]:
    """The first seed of every row: the others take as long."""
    return [job for job in wanted if job.seed == 0]


def path_of(rows: Sequence[Job], results: Path) -> Path:
    return results / f"speed-{fingerprint(*sorted(job.key for job in rows))}.json"


def settings(job: Job) -> dict[str, Any]:
    """How a job's pictures are drawn."""
    if isinstance(job, DrawnJob):
        return job.generation
    if isinstance(job, (UpgradeJob, EnlargedJob)):
        return job.measures["generation"]
    raise RecipeError(f"the row '{job.row}' is not timed: it is neither an upgrade nor enlarged nor drawn")


def candidate(job: Job, wanted: Sequence[Job], out: Path, observer: Observer) -> Candidate:
    """What is timed of a row."""
    if isinstance(job, DrawnJob):
        return Candidate(job.row, job.pipeline, job.resolution, job.compare_at, job.upscale)
    if isinstance(job, EnlargedJob):
        method = trained_upscaler(job, out, observer)
        return Candidate(job.row, str(job.recipe.base.model), None, job.recipe.resolution, method)
    folders = [out / "runs" / seed.key for seed in wanted if seed.row == job.row]
    for folder in folders:
        if (folder / "pipeline").is_dir():
            return Candidate(job.row, str(folder))
    raise RecipeError(
        f"images/s: the weights of '{job.row}' are not in {folders[0]}; use the --out and the machine that trained them"
    )
