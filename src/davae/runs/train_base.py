"""Training of a base model by the run that its recipe needs."""

from __future__ import annotations

from pathlib import Path

from davae.recipes.base import BaseRecipe
from davae.runs.base import BaseRun
from davae.runs.dcgen import DCGenRun
from davae.train.loop import Observer
from davae.train.signals import check_stop, stop_on_signal


def base_run(recipe: BaseRecipe, out: Path, observer: Observer, *, first: Path | None = None) -> BaseRun:
    """Return the run of a recipe, DC-Gen's where it has `align`."""
    kind = BaseRun if recipe.align is None else DCGenRun
    return kind(recipe, out, observer, first=first)


def train_base(recipe: BaseRecipe, out: Path, observer: Observer) -> Path:
    """Train the recipe's model, or resume it, and return the folder of its pipeline."""
    with stop_on_signal(recipe.run.stop_signals):
        pipeline = base_run(recipe, out, observer).run()
        check_stop(str(out))
    return pipeline
