"""Figures of the paper, from the runs of Table 5 that they need."""

from __future__ import annotations

from pathlib import Path

from davae.analyze.curves import compared_runs_figure, curves_figure
from davae.analyze.latents import latents_figure
from davae.analyze.sensitivity import sensitivity_figure
from davae.analyze.spectra import spectra_figure
from davae.lab.reproduce.choose import jobs
from davae.lab.reproduce.job import UpgradeJob
from davae.lab.reproduce.runs import trained_run, trained_stage1
from davae.lab.reproduce.tables import ScaleName
from davae.recipes.sections import Data
from davae.train.loop import Observer

FIGURES = {  # rows of Table 5 that each figure needs
    "fig3": ("full", "without alignment"),
    "fig4": ("full", "without zero initial weights"),
    "figS3": ("full",),
    "figS5": ("full",),
    "tableS2a": ("full",),
}
TRAINED_WHOLE = ("fig4", "figS3")  # the others need no more than the detail VAE and its cache


def figure_jobs(name: str, scale: ScaleName, overrides: list[str]) -> list[UpgradeJob]:
    """Return the runs that a figure needs, in the order of `FIGURES`.

    Args:
        name: a key of `FIGURES`.
        overrides: `a.b=c` for the recipes.
    """
    found = jobs("table5", scale, 1, overrides, list(FIGURES[name]))
    by_row = {job.row: job for job in found if isinstance(job, UpgradeJob)}
    return [by_row[row] for row in FIGURES[name]]


def figure(name: str, scale: ScaleName, overrides: list[str], out: Path, target: Path, observer: Observer) -> Path:
    """Draw a figure of the paper, after training what it needs, and return the path of its PNG.

    Args:
        name: a key of `FIGURES`.
        overrides: `a.b=c` for the recipes.
        out: folder of the runs.
        target: path of the figure.
    """
    full, *others = figure_jobs(name, scale, overrides)
    measured = full.measures["reconstruction"]
    data = Data(source=measured["data"], enlarge=full.recipe.data.enlarge)
    held_out = measured.get("held_out", 0.0)  # the rest is what the runs were trained on
    base = str(full.recipe.base.model)
    if name == "figS3":
        return curves_figure(trained_run(full, out, observer), target)
    if name == "fig4":
        runs = {"zero": trained_run(full, out, observer), "random": trained_run(others[0], out, observer)}
        return compared_runs_figure(runs, target)
    vae = str(trained_stage1(full, out, observer) / "vae")
    if name == "figS5":
        return spectra_figure(vae, data, target, num=1000, held_out=held_out)
    if name == "tableS2a":
        return sensitivity_figure(vae, base, data, target, num=500, held_out=held_out)
    other = str(trained_stage1(others[0], out, observer) / "vae")
    return latents_figure(vae, other, data, target, num=2000, held_out=held_out)
