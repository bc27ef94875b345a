"""What a checkpoint holds: whole tensors by name, whatever engine and however many processes wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from davae.errors import RunError
from davae.train.sharding import fill, like, whole


def snapshot(module: nn.Module, trained: list[str]) -> dict[str, Tensor]:
    """Trained parameters and all buffers by name, whole, on the CPU. Collective where they lie in pieces."""
    parameters = dict(module.named_parameters())
    return {name: whole(parameters[name]) for name in trained} | {
        name: whole(buffer) for name, buffer in module.named_buffers()
    }


def restore(module: nn.Module, trained: list[str], state: Mapping[str, Tensor]) -> None:
    """Put a snapshot back; RunError when the names do not agree exactly."""
    parameters = dict(module.named_parameters())
    own = {name: parameters[name].detach() for name in trained} | dict(module.named_buffers())
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[0]
        raise RunError(f"the checkpoint does not fit this model: '{odd}' stands in only one of them; use a new --out")
    for name, tensor in own.items():
        fill(tensor, state[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As torch's own state_dict, with whole tensors on the CPU."""
    state = optimizer.state_dict()
    entries = {
        number: {key: whole(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse, for parameters in pieces or whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        optimizer.load_state_dict(state)
        for (
            entry
        ) in optimizer.state.values():  # on the CPU they would stay in the checkpoint's file, which goes one day
            entry.update({k: v.clone() for k, v in entry.items() if isinstance(v, Tensor) and v.device.type == "cpu"})
        return
    for number, entry in state["state"].items():
        parameter = parameters[number]
        optimizer.state[parameter] = {
            key: like(value, parameter.detach())
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in entry.items()
        }
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
