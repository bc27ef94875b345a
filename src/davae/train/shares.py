"""Division of the global batch of a step over processes and passes."""

from __future__ import annotations

from dataclasses import dataclass

from davae.errors import RunError
from davae.recipes.sections import Hardware, Optim


@dataclass(frozen=True)
class Share:
    """One process's part of a step.

    Attributes:
        images: of one forward and backward pass.
        passes: forward and backward passes of a step.
    """

    images: int
    passes: int


def share_of_step(settings: Optim, name: str, processes: int, hardware: Hardware | None = None) -> Share:
    """Divide `batch_size` x `accumulation` images, which every step trains on, over processes.

    A process keeps the passes that the recipe names where its batch divides over the processes. Where it does not, and
    where the recipe's hardware has more processes than there are, passes change: none has more images than on
    the recipe's hardware, and each lies within one of the recipe's batches, so that a pass has images of one bucket.

    Args:
        settings: a stage's, with the global batch.
        name: of the stage, for the message.

    Raises:
        RunError: the images of a step cannot be divided over this number of processes.
    """
    batch, step = settings.batch_size, settings.batch_size * settings.accumulation
    own = hardware.count if hardware is not None and batch % hardware.count == 0 else 1
    most = batch // min(own, processes) if batch % processes else batch // processes
    if hardware is not None:
        most = min(most, batch // own)
    for images in range(most, 0, -1):
        if batch % images == 0 and step % (images * processes) == 0:
            return Share(images, step // (images * processes))
    near = max(1, round(step / processes)) * processes
    if settings.accumulation == 1:
        found = f"the global batch of {batch} cannot be divided over {processes} processes; use {near}"
    else:
        found = (
            f"the global batch of {batch} x {settings.accumulation} = {step} cannot be divided over {processes} processes; "
            f"use batch_size={near} and accumulation=1, or another number of processes"
        )
    raise RunError(f"{name}.batch_size: {found}")
