"""The checkpoint of a training that validated best, which is kept."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from davae.files.atomic import atomic_text
from davae.files.reading import load_json, whole_number
from davae.train.distributed import is_main

logger = logging.getLogger(__name__)

BEST = "validation_loss"


class Best:
    """The lowest validation loss of a stage so far, and the step that reached it.

    Args:
        folder: of the run.
        stage: whose checkpoints are meant.
    """

    def __init__(self, folder: Path, stage: str):
        self.path, self.value = folder / "checkpoints" / f"{stage}-best.json", math.inf

    def kept(self) -> int:
        """Return the step whose checkpoint is kept; -1 where no step was validated."""
        try:
            return whole_number(load_json(self.path.read_bytes())["step"])
        except FileNotFoundError:
            return -1
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; the checkpoint that validated best is not known any more", self.path)
            return -1

    def improved(self, values: Mapping[str, float], step: int) -> bool:
        """Return whether this step validated better than all before; its number is then written down."""
        if BEST not in values or not values[BEST] < self.value:
            return False
        self.value = values[BEST]
        if is_main():
            atomic_text(self.path, json.dumps({"step": step, BEST: self.value}))
        return True
