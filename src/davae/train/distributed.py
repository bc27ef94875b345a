"""Values that the processes of one launch exchange, without a wait in a single process."""

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
    """Return rank and number of processes from the launcher's variables, without a group."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if ranks() > 1:
        dist.barrier()


@cache
def _patient_group(world: Any) -> Any:
    """Return a group of all processes over gloo, which keeps no device busy, that waits a year."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def patient_barrier() -> None:
    """Wait for all processes, however long one of them takes."""
    if ranks() > 1:
        dist.barrier(_patient_group(dist.group.WORLD))


def on_main(work: Callable[[], Any]) -> None:
    """Do work in the first process while the others wait, however long it takes.

    Where it fails there, the first process ends and the launcher ends the others.
    """
    if is_main():
        work()
    patient_barrier()


def differing_values(value: Any) -> list[tuple[int, str, Any]]:
    """Return (rank, host, value) of each process whose plain value differs from the first one's.

    The list starts with the first process where it is not empty. Collective; all processes get the same list.
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
    """Return the mean of a tensor over all processes, which hold equal shares of the batch."""
    return tensor if ranks() == 1 else sum_over_ranks(tensor) / ranks()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set in any process. Collective."""
    return flag if ranks() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def from_main(value: Any, *, patient: bool = False) -> Any:
    """Return the first process's value of a plain object. Collective.

    Args:
        value: of this process.
        patient: wait for the first process however long it takes, not just until the time limit of collectives.
    """
    if ranks() == 1:
        return value
    if patient:
        patient_barrier()
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
