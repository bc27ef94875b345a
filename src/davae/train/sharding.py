"""Parameters that lie in pieces on several processes (FSDP2's DTensor, DeepSpeed's ZeRO-3), and whole ones, alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from davae.train.distributed import is_main


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps; the tensor itself where it is whole. Writing to it changes both."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, on the CPU, in the first process; the others, which write nothing, get what they hold.

    Collective where it lies in pieces: every process must ask, in the same order.
    """
    if hasattr(tensor, "ds_tensor"):
        return whole_parameter(tensor, local(tensor))
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        found = tensor.full_tensor()
        return found.cpu() if is_main() else tensor.to_local()
    return tensor.cpu() if is_main() else tensor


def whole_parameter(parameter: Tensor, part: Tensor) -> Tensor:
    """Put together what every process keeps for a parameter (`part`, shaped like `local(parameter)`), as `whole` does."""
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
    """A whole tensor of a parameter's shape, cut into pieces as the parameter is."""
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
