"""Exponential moving average of trained weights, which is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.train.state_dict import gather_parts, like, local


class Average:
    """Sum of decay-weighted past weights, in each process of its own pieces of a parameter.

    The decay after n steps is (1 + n) / (10 + n), at most its final value, as in diffusers' EMAModel: early averages
    forget the start.

    Args:
        parameters: by name.
        decay: final decay in [0,1).
        device: of the average; that of the weights by default. On `cpu` a step copies the weights there.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, device: torch.device | None = None):
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.shadow: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            own = local(parameter.detach())
            self.shadow[name] = own.to(device or own.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (9 + self.steps)) if self.steps > 1 else 0.0
        current = [
            local(parameter.detach()).to(shadow.device, torch.float32)
            for parameter, shadow in zip(self.parameters.values(), self.shadow.values(), strict=True)
        ]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            local(parameter.detach()).copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """Return whole tensors on the CPU. Collective where weights lie in pieces."""
        return {
            "steps": self.steps,
            "shadow": {name: gather_parts(p, self.shadow[name]) for name, p in self.parameters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, parameter in self.parameters.items():
            value = state["shadow"][name]
            self.shadow[name].copy_(local(like(value, parameter.detach())))
