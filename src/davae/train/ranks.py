"""What the processes of one launch tell each other; a single process is answered at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if ranks() > 1:
        dist.barrier()


def on_main(work: Callable[[], Any]) -> None:
    """Do something in the first process; the others wait. A failure there ends the launch, so nobody waits for ever."""
    if is_main():
        work()
    barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    if ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, which hold equal shares of the batch."""
    return tensor if ranks() == 1 else sum_over_ranks(tensor) / ranks()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process; all must ask."""
    return flag if ranks() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def from_main(value: Any) -> Any:
    """The first process's value of a plain object; all must ask."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
