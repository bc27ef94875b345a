"""Loss curves of a run (Fig. S3: base and detail apart)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from davae.analyze.figure import check_figure, write_figure
from davae.errors import ModelError
from davae.evaluate.plot import to_png
from davae.recipes.stages import POLISH
from davae.train.run_folder import read_metrics

SHOWN = {
    "stage1": ("l1", "lpips", "align", "kl", "adversarial"),
    POLISH: ("l1", "lpips", "adversarial"),
    "stage2": ("loss_base", "loss_detail", "detail_weight"),
}
TITLES = {
    "l1": "L1",
    "lpips": "perceptual",
    "align": "alignment",
    "kl": "KL",
    "adversarial": "adversarial",
    "loss_base": "base",
    "loss_detail": "detail",
    "detail_weight": "w(n)",
}


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return the running mean over a share of the points, as long as the input.

    Args:
        values: (N,).
        share: width of the mean, as a share of N.
    """
    width = max(1, int(len(values) * share))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def loss_curves(records: list[dict[str, Any]], stage: str) -> bytes | None:
    """Plot one stage's losses: faint points as logged, and a running mean on top.

    Args:
        records: records of `metrics.jsonl`.
        stage: name of the training.

    Returns:
        PNG bytes, None where the stage has fewer than two records.
    """
    records = [record for record in records if record["stage"] == stage]
    names = [name for name in SHOWN[stage] if any(name in record for record in records)]
    if len(records) < 2 or not names:
        return None
    apart = stage != "stage2"  # terms of stage 1 have their own scales, stage 2's velocity losses share one
    figure, axes = plt.subplots(1, len(names) if apart else 1, figsize=(3.1 * (len(names) if apart else 2.4), 2.6))
    axes = np.atleast_1d(axes)
    for number, name in enumerate(names):
        axis = axes[number if apart else 0]
        steps = np.array([r["step"] for r in records if name in r])
        values = np.array([r[name] for r in records if name in r], dtype=float)
        line = axis.plot(steps, smooth(values), label=TITLES[name], linewidth=1.6)[0]
        axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axis.set_xlabel("step")
        if apart:
            axis.set_title(TITLES[name], fontsize=9)
    if not apart:
        axes[0].legend(frameon=False)
        axes[0].set_ylabel("mean squared error")
        axes[0].set_ylim(bottom=0)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return to_png(figure)


def plain_label(name: str) -> str:
    """Return a name for a legend, free of matplotlib's formulas and hidden underscores."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def compared_curves(runs: dict[str, list[dict[str, Any]]], names: tuple[str, ...]) -> bytes:
    """Plot running means of several runs, a panel a quantity and a line a run.

    Args:
        runs: name -> its records.
        names: keys of the quantities.

    Returns:
        PNG bytes.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 2.8), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        for run, records in runs.items():
            steps = np.array([r["step"] for r in records if name in r])
            values = np.array([r[name] for r in records if name in r], dtype=float)
            axis.plot(steps, smooth(values), label=plain_label(run), linewidth=1.6)
        axis.set_title(TITLES[name], fontsize=9)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0][0].legend(frameon=False, fontsize=8)
    return to_png(figure)


def stage2_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of stage 2 of a run that have both losses.

    Raises:
        ModelError: fewer than two steps.
    """
    found = [r for r in read_metrics(run / "metrics.jsonl") if r["stage"] == "stage2"]
    records = [record for record in found if {"loss_base", "loss_detail"} <= record.keys()]
    if len(records) < 2:
        raise ModelError(f"run {run} has logged no two steps of stage 2; train it first, or name another run")
    return records


def curves_figure(run: Path, out: Path) -> Path:
    """Write the loss curves of a run's stage 2 (Fig. S3), and return the figure's path.

    Args:
        run: the run folder.
        out: folder of the figure.
    """
    check_figure(out, "curves")
    records = stage2_records(run)
    image = loss_curves(records, "stage2")
    assert image is not None
    return write_figure(out, "curves", image, {"run": str(run), "last": records[-1]})


def named_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Return runs by the names of their folders, by their paths where folders share a name."""
    distinct = len({run.name for run in runs}) == len(runs)
    return {run.name if distinct else str(run): run for run in runs}


def compared_runs_figure(runs: dict[str, Path], out: Path) -> Path:
    """Write base and detail loss of several runs side by side, as in Fig. 4.

    Args:
        runs: name -> run folder.
        out: folder of the figure.
    """
    check_figure(out, "compare")
    records = {name: stage2_records(run) for name, run in runs.items()}
    image = compared_curves(records, ("loss_base", "loss_detail"))
    figures = {name: {"run": str(runs[name]), "first": r[0], "last": r[-1]} for name, r in records.items()}
    return write_figure(out, "compare", image, figures)
