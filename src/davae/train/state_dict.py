"""Checkpoint contents: whole tensors by name, with any engine and number of processes.

Parameters lie whole in each process, in pieces as FSDP2's DTensor, or in pieces as DeepSpeed's ZeRO-3 keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from davae.errors import RunError
from davae.train.distributed import is_main


def snapshot(module: nn.Module, trained: list[str]) -> dict[str, Tensor]:
    """Return trained parameters and all buffers by name, whole, on the CPU. Collective."""
    parameters = dict(module.named_parameters())
    parts = {name: parameters[name] for name in trained} | dict(module.named_buffers())
    return {name: gather(part) for name, part in parts.items()}


def restore(module: nn.Module, trained: list[str], state: Mapping[str, Tensor]) -> None:
    """Put a snapshot back.

    Args:
        module: as it was when the snapshot was taken.
        trained: names of the parameters that the snapshot holds.
        state: the snapshot.

    Raises:
        RunError: the names do not agree exactly.
    """
    parameters = dict(module.named_parameters())
    ours = {name: parameters[name].detach() for name in trained} | dict(module.named_buffers())
    if ours.keys() != state.keys():
        unexpected = sorted(ours.keys() ^ state.keys())[0]
        raise RunError(
            f"the checkpoint does not fit this model: '{unexpected}' is in only one of them; use a new --out"
        )
    for name, tensor in ours.items():
        fill(tensor, state[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return torch's state_dict of an optimizer with whole tensors on the CPU. Collective."""
    state = optimizer.state_dict()
    entries = {
        number: {key: gather(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a state of `optimizer_state` back, cut into pieces where the parameters are.

    Args:
        optimizer: with the parameters of the one that was saved, in the same order.
        state: of whole tensors.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        optimizer.load_state_dict(state)
        # on the CPU the tensors would stay in the checkpoint's mapped file, which is deleted one day
        for entry in optimizer.state.values():
            entry.update({k: v.clone() for k, v in entry.items() if isinstance(v, Tensor) and v.device.type == "cpu"})
        return
    fused = {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
    for number, entry in state["state"].items():
        parameter = parameters[number]
        # a fused step counts on the parameter's device; tested on the CPU alone, not on a GPU
        device = parameter.device if parameter in fused else torch.device("cpu")
        optimizer.state[parameter] = {
            key: value
            if not isinstance(value, Tensor)
            else like(value, parameter.detach())
            if value.shape == parameter.shape
            else value.to(device, copy=True)
            for key, value in entry.items()
        }
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process keeps, which shares its memory."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU in the first process, its part in the others.

    Collective where the tensor lies in pieces: all processes call it in the same order.
    """
    if hasattr(tensor, "ds_tensor"):
        return gather_parts(tensor, local(tensor))
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        found = tensor.full_tensor()
        return found.cpu() if is_main() else tensor.to_local()
    return tensor.cpu() if is_main() else tensor


def gather_parts(parameter: Tensor, part: Tensor) -> Tensor:
    """Put together, as `gather` does, the values that each process has for a parameter.

    Args:
        parameter: in pieces or whole; the values are cut like it.
        part: this process's values, shaped like `local(parameter)`.
    """
    if isinstance(parameter, DTensor):
        wrapped = DTensor.from_local(
            part.to(parameter.to_local().device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        found = wrapped.full_tensor()
        return found.cpu() if is_main() else part
    if hasattr(parameter, "ds_tensor"):
        piece: Any = part.to(parameter.device)
        pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, piece)
        if not is_main():
            return part
        return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape).cpu()  # type: ignore[attr-defined]
    return part.detach().cpu() if is_main() else part.detach()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor cut into pieces as a parameter is, on the parameter's device."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.to_local().device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, cut into pieces or not."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            local(parameter).copy_(local(like(value.to(parameter.dtype), parameter)))
        else:
            parameter.copy_(value)
