"""Images that a device takes at a time, by a plan's bytes and by halving."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TILE = 512  # pixels of a tile's side, or as many positions a strip of rows, where one whole image does not fit
SHARE = 0.9  # of the free memory that a plan may fill
Result = TypeVar("Result")


def largest_batch(one: int, budget: int, at_most: int) -> int:
    """Return the largest of at_most, at_most/2, ... images that fits the bytes, 1 at least."""
    batch = at_most
    while batch > 1 and batch * one > budget:
        batch //= 2
    return batch


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a device has left for this process, None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (free + kept))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that a device, or the CPU's allocator, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class OneOnDevice:
    """One model at a time on a device, the others in main memory.

    Nothing moves on the CPU.

    Args:
        device: where the model whose turn it is computes.
    """

    def __init__(self, device: torch.device):
        self.device, self._there = device, None

    def __call__(self, model: Any) -> Any:
        """Move a pipeline or module to the device, the last one back, and return it."""
        if self.device.type == "cpu":
            return model
        if self._there is not None and self._there is not model:
            self._there.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self._there = model
        return model.to(self.device)


class Halving:
    """Work on a few images at a time, whose number is halved when memory runs out.

    Args:
        what: the work, for the log.
        size: images at a time, at first.
        alone: makes one image smaller in memory (tiles), where even one does not fit; None where nothing can.
    """

    def __init__(self, what: str, size: int, alone: Callable[[], None] | None = None):
        self.what, self.size, self.alone = what, size, alone

    def __call__(self, work: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return `work` of images (B,...), put together from parts of at most `size`."""
        return torch.cat(self.parts(lambda first, last: work(images[first:last]), len(images)))

    def parts(self, work: Callable[[int, int], Result], count: int) -> list[Result]:
        """Return `work(first, last)` of consecutive ranges that cover `count` items."""
        found: list[Result] = []
        first = 0
        while first < count:
            last = min(first + self.size, count)
            try:
                found.append(work(first, last))
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._smaller(last - first):
                    raise
                reason = " ".join(str(error).split())[:120]
            else:
                first = last
                continue
            # outside the handler, which would keep the failed pass's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("%s: out of memory (%s); goes on %s", self.what, reason, self._now())
        return found

    def _smaller(self, tried: int) -> bool:
        if tried > 1:
            self.size = max(1, tried // 2)
            return True
        if self.alone is None:
            return False
        self.alone()
        self.size, self.alone = 1, None
        return True

    def _now(self) -> str:
        return (
            f"with {self.size} images at a time"
            if self.alone is not None or self.size > 1
            else "one by one, in tiles"
        )
