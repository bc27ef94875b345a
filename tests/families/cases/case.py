"""A tiny model of a family's real class, and one forward pass of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from davae.backbones.families import FAMILIES

Run = Callable[[Any, Any, Tensor], Tensor]
Builder = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """Constructor arguments of a tiny model of the class, and how to call one.

    Attributes:
        config: constructor arguments.
        call: one forward pass of a model.
        tolerance: the difference that sums in another order leave in float64; larger for classes that compute in float32
            inside, whatever their weights.
    """

    config: dict[str, Any]
    call: Run
    tolerance: float = 1e-10

    def build(self, name: str, **changes: Any) -> Any:
        """The model, every weight random, in eval mode."""
        model = getattr(diffusers, name)(**{**self.config, **changes})
        for (
            parameter
        ) in model.parameters():  # several classes start their modulation or head at zero: every path matters
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def run(self, model: Any, x: Tensor) -> Tensor:
        """One pass with the same conditions every time."""
        torch.manual_seed(5)
        name = type(model).__name__
        return self.call(model, getattr(diffusers, FAMILIES[name].pipeline), x)
