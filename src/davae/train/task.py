"""Base class of the stages that the training loop runs: trainables, data and loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from davae.recipes.sections import Optim
from davae.train.monitor import WeightGroups
from davae.train.random import SampleRandom

Settings = TypeVar("Settings", bound=Optim)


@dataclass
class Trainable:
    """One optimizer and the weights that it trains.

    Attributes:
        module: holds the weights.
        groups: AdamW groups; each may carry its own `lr_multiplier`.
        lr: learning rate after warm-up.
        ema: whether an average is kept of the weights.
        clip: whether `max_grad_norm` clips their gradient.
        parts: returns groups of weights whose gradient norms are logged apart.
    """

    module: nn.Module
    groups: list[dict[str, Any]]
    lr: float
    ema: bool = True
    clip: bool = True
    parts: Callable[[], WeightGroups] | None = None

    def __post_init__(self) -> None:
        self.trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, perhaps pieces by which an engine replaced them."""
        own = dict(self.module.named_parameters())
        return {name: own[name] for name in self.trained}


class Task(ABC, Generic[Settings]):
    """One stage of training: what it trains, on which data, by which loss.

    Attributes:
        name: of the stage, in metrics and checkpoints.
        settings: the recipe's section of the stage.
        trainables: by name; the first one's learning rate is logged.
        modules: one for each trainable, called in `loss`; the loop replaces them by their wrapped selves.
        dataset: its `groups` are the buckets of its items.
        collate: items -> batch.
    """

    name: str
    settings: Settings
    trainables: dict[str, Trainable]
    modules: dict[str, nn.Module]
    dataset: Any
    collate: Callable[[list[Any]], Any]

    def trainables_at(self, step: int) -> list[str]:
        """Return the names of what is trained at this step, in order: all trainables."""
        return list(self.trainables)

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Add hooks to a trainable's optimizer before training, none by default."""

    @abstractmethod
    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        """Return the scalar loss of one trainable, and values to log by name.

        Args:
            name: of the trainable; called in the order of `trainables_at` on the same batch.
            batch: as `collate` made it.
            step: counts from 0.
            draws: all randomness of this batch.
        """
