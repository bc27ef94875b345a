"""Figures of the paper, from the runs of Table 5 that they need."""

from __future__ import annotations

from pathlib import Path

from davae import analysis
from davae.recipes.tables import ScaleName
from davae.reproduction.choose import jobs
from davae.reproduction.job import UpgradeJob
from davae.reproduction.runs import trained_run, trained_stage1
from davae.train.loop import Observer

FIGURES = ("fig3", "fig4", "figS3", "figS5", "tableS2a")


def figure(name: str, scale: ScaleName, overrides: list[str], out: Path, target: Path, observer: Observer) -> Path:
    """A figure of the paper; trains what it needs and returns its PNG."""
    full, _, unaligned, drawn = (job for job in jobs("table5", scale, 1, overrides) if isinstance(job, UpgradeJob))
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
