"""What the processes of one launch tell each other; a single process is answered at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes from the launcher's variables: no process group is needed."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if ranks() > 1:
        dist.barrier()


@cache
def _patient_group(world: Any) -> Any:
    """Return a group of all processes whose collectives wait for a year: over gloo, so that no device is kept busy."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def patient_barrier() -> None:
    """Wait for all processes, however long one of them takes."""
    if ranks() > 1:
        dist.barrier(_patient_group(dist.group.WORLD))


def on_main(work: Callable[[], Any]) -> None:
    """Do something in the first process; the others wait, however long it takes.

    Where it fails there, the first process ends and the launcher ends the others.
    """
    if is_main():
        work()
    patient_barrier()


def compare(value: Any) -> list[tuple[int, str, Any]]:
    """Return (rank, host, value) of each process whose value of a plain object differs from the first one's.

    The list starts with the first process where it is not empty. All processes must ask; all get the same answer.
    """
    if ranks() == 1:
        return []
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, (rank(), socket.gethostname(), value))
    others = [entry for entry in found if entry[2] != found[0][2]]
    return [found[0], *others] if others else []


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
