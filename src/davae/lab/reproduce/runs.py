"""Run a job: train what is not trained yet, measure it, and time the rows of a table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel

from davae.data.latent_cache.key import hash_values
from davae.errors import RecipeError
from davae.evaluate.generation import evaluate_generation
from davae.evaluate.reconstruction import evaluate_reconstruction
from davae.evaluate.throughput import Candidate, time_pictures
from davae.files.atomic import atomic_text, saving
from davae.files.reading import read_object
from davae.lab.bench.clock import machine
from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, Job, UpgradeJob
from davae.lab.super_resolution import train_super_resolution
from davae.publish.assemble import POLISHED, VAE_FOLDER
from davae.recipes import BaseRecipe, Recipe
from davae.recipes.places import OURS, YOURS, places
from davae.recipes.sections import Data, Stage2
from davae.runs.train_base import base_run
from davae.runs.upgrade import Upgrade
from davae.sample.open import SamplingOptions
from davae.train.loop import Observer, Progress
from davae.train.run_folder import read_metrics, was_done

UNUSED = Stage2(max_steps=1, batch_size=1)  # a folder of stage 1 alone serves every stage 2
OWN = "of this run"  # instead of a path that only this machine has


def check_files(todo: Sequence[Job]) -> None:
    """Refuse jobs whose files, or images to measure with, are not here, before any work.

    Raises:
        RecipeError: names the row, the file and what to do.
    """
    for job in todo:
        parts = {name: vars(job)[name] for name in ("recipe", "measures", "generation") if name in vars(job)}
        for path, text in places({name: _plain(part) for name, part in parts.items()}):
            if text.startswith(OURS) and not Path(text).exists():
                raise RecipeError(
                    f"row '{job.row}', {path}: {text} is not here; it belongs to the project's own benchmarks, so run this "
                    "in davae's repository, next to the shared data"
                )
            if text.startswith(YOURS) and not path.startswith("recipe.") and not Path(text).exists():
                raise RecipeError(
                    f"row '{job.row}', {path}: {text} is not here; put the images that measure a row there"
                )


def _plain(part: BaseModel | dict[str, Any]) -> dict[str, Any]:
    return part.model_dump(mode="json") if isinstance(part, BaseModel) else part


def finished(job: Job, results: Path) -> dict[str, Any] | None:
    """Return the figures of a finished job, from any machine, or None.

    Args:
        results: folder of finished runs' figures.
    """
    path = results / f"{job.key}.json"
    return read_object(path) if path.is_file() else None


def run_job(job: Job, out: Path, results: Path, observer: Observer) -> dict[str, Any]:
    """Train and measure a job, or resume it, and return its figures.

    Jobs that agree in everything up to their latents share the autoencoder and the cache.

    Args:
        out: folder of the runs.
        results: folder of finished runs' figures.

    Raises:
        RecipeError: a job that only plans.
    """
    known = finished(job, results)
    if known is not None:
        return known
    with saving(results):  # before hours of training, not after
        results.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures = {
        "row": job.row,
        "seed": job.seed,
        "command": job.command,
        **measured(job, out, observer),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": machine(),
    }
    atomic_text(results / f"{job.key}.json", json.dumps(figures, indent=2) + "\n")
    return figures


def measured(job: Job, out: Path, observer: Observer) -> dict[str, Any]:
    """Train what a job needs, and return its figures."""
    match job:
        case UpgradeJob():
            return upgraded_figures(job, out, observer)
        case EnlargedJob():
            return enlarged_figures(job, out, observer)
        case BaseJob():
            return base_figures(job, out, observer)
        case DrawnJob():
            return drawn_figures(job, out, observer)
    raise RecipeError(f"the row '{job.row}' is a plan: run its commands")


# -- training --------------------------------------------------------------------------------------------------------


def trained_stage1(job: UpgradeJob, out: Path, observer: Observer) -> Path:
    """Return the folder of a job's DetailVAE and cache, trained if needed.

    Jobs that agree up to the cache share it.
    """
    first = out / "stage1" / job.stage1_key
    if was_done(first, "cache"):  # in another precision perhaps: hashes leave `run` out
        return first
    unused = UNUSED.model_copy(update={"data": job.recipe.stage2.data})
    plain = job.recipe.stage1.model_copy(update={"polish": None})
    run = Upgrade(job.recipe.model_copy(update={"stage1": plain, "stage2": unused}), first, observer)
    run.train_vae()
    run.cache_latents()
    run.folder.close()
    return first


def trained_run(job: UpgradeJob, out: Path, observer: Observer) -> Path:
    """Return a job's run folder, trained if needed."""
    first, folder = trained_stage1(job, out, observer), out / "runs" / job.key
    run = Upgrade(job.recipe, folder, observer, stage1=first)
    run.train_dit()
    run.folder.close()
    return folder


def trained_upscaler(job: EnlargedJob, out: Path, observer: Observer) -> str:
    """Return the value of `--upscale`: a method, or weights or a run, trained if needed."""
    if job.upgrade is not None:
        return str(trained_run(job.upgrade, out, observer))
    if job.super_resolution is None:
        return job.upscale
    folder = out / "networks" / hash_values(job.super_resolution.model_dump(mode="json"))
    return str(train_super_resolution(job.super_resolution, folder, observer))


def trained_autoencoder(job: BaseJob, out: Path, observer: Observer) -> Path:
    """Return the folder of a base job's autoencoder and cache, trained if needed.

    Jobs that agree up to the cache share it.
    """
    if job.detail is not None:
        return trained_stage1(job.detail, out, observer)
    first = out / "autoencoders" / job.autoencoder_key
    if was_done(first, "cache"):
        return first
    run = base_run(job.prepared, first, observer)
    run.prepare()
    run.folder.close()
    return first


def trained_base(job: BaseJob, first: Path, out: Path, observer: Observer) -> Path:
    """Return a job's run folder, trained if needed on the autoencoder and cache in `first`."""
    folder = out / "runs" / job.key
    run = base_run(job.recipe, folder, observer, first=first)
    run.run()
    run.folder.close()
    return folder


# -- measuring -------------------------------------------------------------------------------------------------------


def upgraded_figures(job: UpgradeJob, out: Path, observer: Observer) -> dict[str, Any]:
    """Train an upgrade, and return its figures."""
    folder, first = trained_run(job, out, observer), out / "stage1" / job.stage1_key
    vae = first / VAE_FOLDER if job.recipe.stage1.polish is None else folder / POLISHED
    generation = measured_generation(
        str(folder), job.measures["generation"], out, observer, job.recipe.resolution, enlarge=job.recipe.data.enlarge
    )
    return {
        "generation": generation | {"pipeline": OWN},
        "reconstruction": reconstruction_once(vae, job.measures["reconstruction"], job.recipe),
        "training": last_losses(folder, "stage2", ("loss_base", "loss_detail")),
        "recipe": job.recipe.model_dump(mode="json", exclude_defaults=True),
    }


def enlarged_figures(job: EnlargedJob, out: Path, observer: Observer) -> dict[str, Any]:
    """Return the figures of the base model's images, enlarged."""
    method = trained_upscaler(job, out, observer)
    figures = measured_generation(
        str(job.recipe.base.model),
        job.measures["generation"],
        out,
        observer,
        job.recipe.resolution,
        upscale=method,
        enlarge=job.recipe.data.enlarge,
    )
    return {"generation": figures | {"upscale": job.upscale}}


def base_figures(job: BaseJob, out: Path, observer: Observer) -> dict[str, Any]:
    """Train a transformer on plain latents, and return its figures and those of its autoencoder."""
    first = trained_autoencoder(job, out, observer)
    folder = trained_base(job, first, out, observer)
    generation = measured_generation(
        str(folder), job.measures["generation"], out, observer, job.recipe.resolution, enlarge=job.recipe.data.enlarge
    )
    figures = {
        "generation": generation | {"pipeline": OWN},
        "reconstruction": reconstruction_once(first / VAE_FOLDER, job.measures["reconstruction"], job.recipe),
        "training": last_losses(folder, "dit", ("loss",)),
        "recipe": job.recipe.model_dump(mode="json", exclude_defaults=True),
    }
    if job.detail is not None:
        figures["detail_vae"] = job.detail.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"stage2"})
    return figures


def drawn_figures(job: DrawnJob, out: Path, observer: Observer) -> dict[str, Any]:
    """Return the figures of an existing model."""
    generation = measured_generation(
        job.pipeline,
        job.generation,
        out,
        observer,
        job.compare_at,
        resolution=job.resolution,
        upscale=job.upscale,
        seed=job.seed,
    )
    return {"generation": generation}


def measured_generation(
    pipeline: str,
    chosen: dict[str, Any],
    out: Path,
    observer: Observer,
    compare_at: int | None,
    *,
    enlarge: bool = False,
    resolution: int | None = None,
    upscale: str = "bilinear",
    seed: int = 0,
) -> dict[str, Any]:
    """Return FD or FID of samples at `compare_at` pixels by the settings of a table.

    Args:
        out: folder of the runs, which keeps the measurements of the real images, and the samples before they are
            enlarged: all enlargers of one base share them.
    """
    return evaluate_generation(
        pipeline,
        Data(source=chosen["data"], enlarge=enlarge),
        SamplingOptions(
            chosen["steps"], chosen["guidance"], seed, resolution, batch_size=chosen.get("batch_size", 32)
        ),
        num=chosen["num"],
        compare_at=compare_at,
        held_in=chosen.get("held_in", 0.0),
        features=chosen["features"],
        feature_weights=None,
        on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        upscale=upscale,
        keep=out,
    )


def reconstruction_once(vae: Path, settings: dict[str, Any], recipe: Recipe | BaseRecipe) -> dict[str, Any]:
    """Return reconstruction figures of an autoencoder that runs may share, measured once.

    Args:
        vae: the autoencoder's folder; the figures are kept next to it.
        settings: data and number of images.
        recipe: whose training prepares its images as the measurement does.
    """
    path = vae.parent / f"reconstruction-{hash_values(settings)}.json"
    if not path.is_file():
        data = Data(source=settings["data"], enlarge=recipe.data.enlarge)
        held_out = settings.get("held_out", 0.0)
        figures = evaluate_reconstruction(str(vae), data, recipe.resolution, settings["num"], held_out)
        atomic_text(path, json.dumps({**figures, "vae": OWN}) + "\n")
    return read_object(path)


def last_losses(folder: Path, stage: str, names: tuple[str, ...], points: int = 10) -> dict[str, float]:
    """Return losses of a training, averaged over the last logged points.

    Args:
        folder: of the run.
        stage: `stage2` or `dit`.
        names: of the losses.
        points: how many logged steps are averaged.
    """
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == stage][-points:]
    return {name: mean(record[name] for record in records) for name in names}


# -- timing --------------------------------------------------------------------------------------------------------


def measure_speed(jobs: Sequence[Job], out: Path, results: Path, observer: Observer) -> dict[str, Any]:
    """Time one image of each row, all rows alternating in one process, and return the figures.

    Args:
        jobs: of all rows of a table.
        out: the folder of `run_job`; a trained row is timed with the weights of any seed there.
        results: folder of finished runs' figures, which takes those of the speed too.

    Raises:
        RecipeError: the weights of a row are on another machine.
    """
    known = speeds(jobs, results)
    if known is not None:
        return known
    rows = timed_jobs(jobs)
    generation = _drawing(rows[0])
    figures = {
        "rows": time_pictures(
            [_candidate(job, jobs, out, observer) for job in rows],
            generation["data"],
            steps=generation["steps"],
            guidance=generation["guidance"],
        ),
        "machine": machine(),
    }
    with saving(results):
        atomic_text(_speed_file(rows, results), json.dumps(figures, indent=2) + "\n")
    return figures


def speeds(jobs: Sequence[Job], results: Path) -> dict[str, Any] | None:
    """Return the figures of `measure_speed`, from any machine, or None."""
    path = _speed_file(timed_jobs(jobs), results)
    return read_object(path) if path.is_file() else None


def timed_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Return the job of each timed row's first seed, as other seeds take as long."""
    return [job for job in jobs if job.seed == 0 and job.timed]


def _speed_file(rows: Sequence[Job], results: Path) -> Path:
    return results / f"speed-{hash_values(*sorted(job.key for job in rows))}.json"


def _drawing(job: Job) -> dict[str, Any]:
    """Return the settings with which a job's images are drawn."""
    if isinstance(job, DrawnJob):
        return job.generation
    if isinstance(job, (UpgradeJob, EnlargedJob)):
        return job.measures["generation"]
    raise RecipeError(f"the row '{job.row}' is not timed: it is neither an upgrade nor enlarged nor drawn")


def _candidate(job: Job, jobs: Sequence[Job], out: Path, observer: Observer) -> Candidate:
    """Return the model that is timed for a row."""
    if isinstance(job, DrawnJob):
        return Candidate(job.row, job.pipeline, job.resolution, job.compare_at, job.upscale)
    if isinstance(job, EnlargedJob):
        method = trained_upscaler(job, out, observer)
        return Candidate(job.row, str(job.recipe.base.model), None, job.recipe.resolution, method)
    folders = [out / "runs" / seed.key for seed in jobs if seed.row == job.row]
    for folder in folders:
        if (folder / "pipeline").is_dir():
            return Candidate(job.row, str(folder))
    raise RecipeError(
        f"images/s: the weights of '{job.row}' are not in {folders[0]}; use the --out and the machine that trained them"
    )
