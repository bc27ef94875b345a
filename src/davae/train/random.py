"""All randomness of training: a sample's noise depends on its place in the run alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def named_generator(*names: int | str) -> torch.Generator:
    """Return a generator on the CPU whose seed is a hash of its names."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class SampleRandom:
    """Random values of one batch: a generator a sample, and one for the whole global batch.

    A global batch divided over any number of processes gives each sample the same values; resuming needs no saved state.

    Args:
        seed, stage: of the training.
        batch: number of the global batch since the training's start.
        place: of this process's first sample in the global batch.
        count: samples of this process.
    """

    def __init__(self, seed: int, stage: str, batch: int, place: int, count: int):
        self.names = (seed, stage, batch, place, count)
        self.batch = named_generator(seed, stage, "batch", batch)
        self.samples = [named_generator(seed, stage, batch, place + number) for number in range(count)]

    def restarted(self) -> SampleRandom:
        """Return the same values from the start."""
        return SampleRandom(*self.names)

    def uniform(self) -> Tensor:
        """Draw (B,) in [0,1)."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.samples])

    def normal(self, *shape: int) -> Tensor:
        """Draw (B,*shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.samples])
