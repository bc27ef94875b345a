"""Loss scaling of fp16 training: one optimizer unscaled at a time, one update of the scale a step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class LossScale:
    """The GradScaler of an accelerator, or nothing where the precision needs none.

    accelerate's own calls unscale the gradients of all optimizers at once and update the scale after each of them. With two
    optimizers (a GAN) the second one would then be unscaled twice.

    Args:
        accelerator: its `scaler` scales the loss in `accelerator.backward`.
    """

    FLOOR = 1.0  # an overflow at this scale or below is not the scale's fault

    def __init__(self, accelerator: Accelerator):
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        self._initial = self.state()

    def unscale(self, optimizer: Any) -> None:
        """Divide the gradients of one prepared optimizer by the scale, in place."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)

    def update(self) -> None:
        """Lower the scale after an overflow in any optimizer, raise it after many good steps. Once a step."""
        if self.scaler is not None:
            self.scaler.update()

    def counts(self, bad: Tensor, lost: Tensor) -> Tensor:
        """Return whether a skipped step counts towards the end of the run, a boolean scalar.

        An overflow of the scaled gradient is how a scaler finds its scale. It counts once the loss itself is not finite or
        the scale cannot be the cause.

        Args:
            bad: whether the gradient was not finite.
            lost: whether a loss was not finite.
        """
        if self.scaler is None or self.scaler.get_scale() <= self.FLOOR:
            return bad
        return bad & lost

    def state(self) -> dict[str, Any]:
        """Return scale and growth counter, plain values; empty without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state; an empty one (an older checkpoint, another precision) changes nothing."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def reset(self) -> None:
        """Return to the state in which this training found the scaler: the next stage starts as it does after a resume."""
        self.load(self._initial)
