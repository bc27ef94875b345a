"""The checkpoint of a training that validated best, which is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from davae.files import atomic_text
from davae.train.ranks import is_main

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
        return json.loads(self.path.read_text(encoding="utf-8"))["step"] if self.path.is_file() else -1

    def improved(self, values: Mapping[str, float], step: int) -> bool:
        """Return whether this step validated better than all before; its number is then written down."""
        if BEST not in values or not values[BEST] < self.value:
            return False
        self.value = values[BEST]
        if is_main():
            atomic_text(self.path, json.dumps({"step": step, BEST: self.value}))
        return True
