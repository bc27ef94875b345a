"""Check of what trainings need of a machine, before the first of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from davae.errors import RunError
from davae.recipes.sections import Hardware, Optim, Run
from davae.train.distributed import ranks
from davae.train.shares import share_of_step

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # name -> package


def check_trainings(trainings: Mapping[str, Optim], run: Run, hardware: Hardware | None = None) -> None:
    """Refuse packages that are not installed, and batches that do not divide over the processes.

    Args:
        trainings: settings of each training by its path in the recipe.
        run: names the trackers; accelerate would leave out silently what is not installed.
        hardware: of the recipe.

    Raises:
        RunError: names the setting, and what to install or to set.
    """
    for name in run.trackers:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise RunError(f"run.trackers: {name} is not installed; `pip install {TRACKERS[name]}`, or leave it out")
    for name, settings in trainings.items():
        share_of_step(settings, name, ranks(), hardware)
        if settings.optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise RunError(
                f"{name}.optimizer: adamw-8bit needs bitsandbytes; `pip install bitsandbytes`, or set it to adamw"
            )
