"""`davae reproduce`: the runs of one of the paper's tables, each done once, and the table they make."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from davae import analysis
from davae.data.cache_key import fingerprint
from davae.measure import evaluate_generation, evaluate_reconstruction
from davae.recipes import RecipeError, load_recipe
from davae.recipes.loading import suggestion
from davae.recipes.schema import Recipe, Stage2, SuperResolutionRecipe
from davae.recipes.tables import Row, Scale, ScaleName, load_scale, load_table, row_overrides, row_recipe
from davae.train.loop import Observer, Progress
from davae.train.plan import gpu_days
from davae.train.state import read_metrics, replace_text, saving
from davae.train.super_resolution import WEIGHTS, train_super_resolution
from davae.train.upgrade import Upgrade

SHOWN = (  # key, heading, decimals
    ("generation.fd_lite0", "FD-lite0", 2),
    ("generation.fid", "FID", 2),
    ("reconstruction.psnr", "PSNR, dB", 2),
    ("reconstruction.ssim", "SSIM", 4),
    ("reconstruction.lite0", "perceptual", 4),
    ("training.loss_base", "base loss", 3),
    ("training.loss_detail", "detail loss", 3),
)
UNUSED = Stage2(max_steps=1, batch_size=1)  # a folder of stage 1 alone serves every stage 2


@dataclass(frozen=True)
class Job:
    """One run of one row. Two rows with the same recipe are the same job."""

    row: str
    seed: int
    recipe: Recipe
    measures: dict[str, Any]
    command: str
    upscale: str | None = None  # the base model's pictures, enlarged, instead of a trained upgrade
    super_resolution: SuperResolutionRecipe | None = None  # the network that enlarges them, where one is trained

    @cached_property
    def key(self) -> str:
        """Hash of all that its figures hang on; defaults are left out, so that new options change no hash."""
        if self.upscale is not None:
            network = None if self.super_resolution is None else self.super_resolution.model_dump(mode="json")
            return fingerprint(
                self.upscale, model_digest(self.recipe.base.model), network, self.measures["generation"]
            )
        values = self.recipe.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "run", "report", "sampling"}
        )
        return fingerprint(values, model_digest(self.recipe.base.model), self.recipe.run.seed, self.measures)

    @cached_property
    def stage1_key(self) -> str:
        """Hash of what stage 1 and the cache hang on."""
        fields = {"base", "scale", "detail_channels", "downsample", "data", "stage1", "cache", "init"}
        values = self.recipe.model_dump(mode="json", exclude_defaults=True, include=fields)
        return fingerprint(values, model_digest(self.recipe.base.model), self.recipe.run.seed)


@cache
def model_digest(model: str | None) -> str:
    """Hash of a model folder's weights, so that figures of older weights are not taken for those of new ones."""
    files = sorted(Path(model).rglob("*.safetensors")) if model is not None else []
    digest = hashlib.sha256(str(model).encode() if not files else b"")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def jobs(
    table: str, scale: ScaleName, seeds: int | None, overrides: list[str], rows: list[str] | None = None
) -> list[Job]:
    """Every run that a table, or some of its rows, needs: one seed of all rows before the next seed.

    Raises:
        RecipeError: unknown table or row, or an override that does not fit the recipe.
    """
    chosen, settings = load_table(table), load_scale(scale)
    names = [row.name for row in chosen.rows]
    for wanted in rows or []:
        if wanted not in names:
            raise RecipeError(
                f"{table} has no row '{wanted}'{suggestion(wanted, names)} (its rows: {'; '.join(names)})"
            )
    measures = {
        "generation": settings.generation.model_dump(),
        "reconstruction": settings.reconstruction.model_dump(),
    }
    found: list[Job] = []
    for seed in range(seeds or settings.seeds):
        for row in chosen.rows:
            if rows and row.name not in rows:
                continue
            recipe = row_recipe(settings, chosen, row, seed, overrides)
            assert isinstance(recipe, Recipe)
            if row.upscale is not None:
                if seed == 0 and (row.upscale != "network" or settings.super_resolution is not None):
                    found.append(enlarged_job(row, recipe, measures, settings))
                continue
            changes = [*row_overrides(settings, chosen, row, seed), *overrides]
            words = ["davae", "train-dit", settings.recipe, *(w for change in changes for w in ("--set", change))]
            found.append(Job(row.name, seed, recipe, measures, shlex.join(words)))
    return found


def enlarged_job(row: Row, recipe: Recipe, measures: dict[str, Any], settings: Scale) -> Job:
    """A row of enlarged pictures. Nothing hangs on stage 2's seed, so there is one."""
    if recipe.base.model is None:
        raise RecipeError("tables need a base model that is trained already: --set base.model=FOLDER")
    sr, words = None, []
    method = str(row.upscale)
    if method == "network":
        sr = load_recipe(str(settings.super_resolution))
        assert isinstance(sr, SuperResolutionRecipe)
        words = ["davae", "train-sr", str(settings.super_resolution), "--out", "runs/sr", "&&"]
        method = f"runs/sr/{WEIGHTS}"
    chosen = settings.generation
    words += ["davae", "evaluate", "generation", "--pipeline", recipe.base.model, "--data", chosen.data]
    words += ["--compare-at", str(recipe.resolution), "--upscale", method, "--num", str(chosen.num)]
    words += ["--steps", str(chosen.steps), "--guidance", str(chosen.guidance), "--features", chosen.features]
    return Job(row.name, 0, recipe, measures, " ".join(words), row.upscale, sr)


def finished(job: Job, results: Path) -> dict[str, Any] | None:
    """The figures of a job that was run before, here or elsewhere."""
    path = results / f"{job.key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_job(job: Job, out: Path, results: Path, observer: Observer) -> dict[str, Any]:
    """Train and measure; stage 1 and the cache are shared by all jobs that agree up to there. Resumes."""
    known = finished(job, results)
    if known is not None:
        return known
    with saving(results):  # before hours of training, not after
        results.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures = enlarged_figures(job, out, observer) if job.upscale else upgraded_figures(job, out, observer)
    figures = {
        "row": job.row,
        "seed": job.seed,
        "command": job.command,
        **figures,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    replace_text(results / f"{job.key}.json", json.dumps(figures, indent=2) + "\n")
    return figures


def trained_stage1(job: Job, out: Path, observer: Observer) -> Path:
    """Folder of the DetailVAE and cache that a job shares with others; trained if it is not there."""
    first = out / "stage1" / job.stage1_key
    run = Upgrade(job.recipe.model_copy(update={"stage2": UNUSED}), first, observer)
    run.train_vae()
    run.cache_latents()
    run.folder.close()
    return first


def trained_run(job: Job, out: Path, observer: Observer) -> Path:
    """A job's run folder; trained if it is not there."""
    first, folder = trained_stage1(job, out, observer), out / "runs" / job.key
    run = Upgrade(job.recipe, folder, observer, stage1=first)
    run.train_dit()
    run.folder.close()
    return folder


def upgraded_figures(job: Job, out: Path, observer: Observer) -> dict[str, Any]:
    """Train an upgrade, and measure it."""
    folder = trained_run(job, out, observer)
    return {
        "generation": measured_generation(str(folder), job, observer) | {"pipeline": "of this run"},
        "reconstruction": reconstruction_once(out / "stage1" / job.stage1_key, job.measures["reconstruction"]),
        "training": last_losses(folder),
        "recipe": job.recipe.model_dump(mode="json", exclude_defaults=True),
    }


def enlarged_figures(job: Job, out: Path, observer: Observer) -> dict[str, Any]:
    """Measure the base model's pictures, enlarged."""
    method = str(job.upscale)
    if job.super_resolution is not None:
        folder = out / "networks" / fingerprint(job.super_resolution.model_dump(mode="json"))
        method = str(train_super_resolution(job.super_resolution, folder, observer))
    figures = measured_generation(str(job.recipe.base.model), job, observer, method)
    return {"generation": figures | {"upscale": job.upscale}}


def measured_generation(pipeline: str, job: Job, observer: Observer, upscale: str = "bilinear") -> dict[str, Any]:
    """FD or FID of samples at the upgraded size, as the table's scale says."""
    chosen = job.measures["generation"]
    return evaluate_generation(
        pipeline,
        chosen["data"],
        num=chosen["num"],
        resolution=None,
        compare_at=job.recipe.resolution,
        steps=chosen["steps"],
        guidance=chosen["guidance"],
        seed=0,
        held_in=0.0,
        features=chosen["features"],
        feature_weights=None,
        on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        upscale=upscale,
    )


def reconstruction_once(first: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Reconstruction figures of a shared stage 1, measured once and kept beside it."""
    path = first / f"reconstruction-{fingerprint(settings)}.json"
    if not path.is_file():
        figures = evaluate_reconstruction(str(first / "vae"), settings["data"], None, settings["num"], 0.0)
        replace_text(path, json.dumps({**figures, "vae": "of this run"}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def last_losses(folder: Path, points: int = 10) -> dict[str, float]:
    """Base and detail loss of stage 2, averaged over the last logged points."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "stage2"][-points:]
    return {name: mean(record[name] for record in records) for name in ("loss_base", "loss_detail")}


def spread(values: list[float], decimals: int) -> str:
    """`mean ± standard deviation` over seeds; the mean alone where there is one."""
    text = f"{mean(values):.{decimals}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{decimals}f}"


def table_rows(todo: list[Job], results: Path) -> tuple[list[str], list[list[str]]]:
    """(headings, a line a row) of what has been run: mean and spread over seeds, and how many there are."""
    done: dict[str, list[dict[str, Any]]] = {job.row: [] for job in todo}
    for job in todo:
        figures = finished(job, results)
        if figures is not None:
            done[job.row].append(figures)
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


def missing_parts(todo: list[Job]) -> list[str]:
    """What a table at the paper's scale needs and this machine lacks."""
    needed = {
        path
        for job in todo
        for path in (job.recipe.base.model, job.recipe.data.source, job.measures["generation"]["data"])
        if path is not None
    }
    lacking = [f"{path} does not exist" for path in sorted(needed) if not Path(path).exists()]
    return lacking if torch.cuda.is_available() else [*lacking, "there is no GPU"]


def cost(job: Job) -> str:
    """H100-days of a run, where the base model's configs are at hand."""
    model = job.recipe.base.model
    if model is None or not Path(model).exists():
        return f"cost unknown until {model} is there"
    return f"about {gpu_days(job.recipe):.2g} H100-days"


# -- figures -----------------------------------------------------------------------------------------------------

FIGURES = ("fig3", "fig4", "figS3", "figS5", "tableS2a")


def figure(name: str, scale: ScaleName, overrides: list[str], out: Path, target: Path, observer: Observer) -> Path:
    """A figure of the paper, from the runs of Table 5 that it needs; returns its PNG."""
    full, _, unaligned, drawn = jobs("table5", scale, 1, overrides)
    data = full.measures["reconstruction"]["data"]
    base = str(full.recipe.base.model)
    if name == "figS3":
        return analysis.curves(trained_run(full, out, observer), target)
    if name == "fig4":
        runs = {"zero": trained_run(full, out, observer), "random": trained_run(drawn, out, observer)}
        return analysis.compare(runs, target)
    vae = str(trained_stage1(full, out, observer) / "vae")
    if name == "figS5":
        return analysis.spectra(vae, data, target, num=1000, held_out=0.0)
    if name == "tableS2a":
        return analysis.sensitivity(vae, base, data, target, num=500, held_out=0.0)
    other = str(trained_stage1(unaligned, out, observer) / "vae")
    return analysis.latents(vae, other, data, target, num=2000, held_out=0.0)
