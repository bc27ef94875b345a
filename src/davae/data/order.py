"""The order of training: which pictures make which batch, on which process, for ever the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from davae.data.pictures import collate


class Batches:
    """Batch number -> [(position, draw)], a pure function of the seed.

    Every epoch is a new permutation; batches run across epoch ends, so none is short. All processes share one stream of
    batches: process r of R takes r, r+R, r+2R, ... after those drawn before, whatever R was then. So no picture of an
    epoch is repeated or lost when the number of processes changes, and starting at batch k gives what an uninterrupted
    run would have seen.

    With buckets a batch holds pictures of one bucket. Bucket g with n_g pictures gives floor(e n_g / B) batches in the
    first e epochs, in an order shuffled by epoch; what is left over of an epoch comes first in the next.

    Args:
        length: pictures, or latents, in the set.
        batch_size: B, of one process.
        start, stop: batches of this process that are already over, and the number to stop at.
        rank, ranks: this process and how many there are.
        drawn: pictures that all processes drew before `start`; by default as many as with these `ranks`.
        groups: (length,) the bucket of each; None is one bucket.

    Raises:
        ValueError: `drawn` is no multiple of `batch_size`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        ranks: int = 1,
        drawn: int | None = None,
        groups: np.ndarray | None = None,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop, self.rank, self.ranks = start, stop, rank, ranks
        before = start * ranks * batch_size if drawn is None else drawn
        if before % batch_size:
            raise ValueError(f"{before} pictures were drawn, which is no multiple of the batch size {batch_size}")
        self.before = before // batch_size
        labels = np.zeros(length, np.int16) if groups is None else groups
        self.members = [np.flatnonzero(labels == group) for group in np.unique(labels)]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> its epoch and permutation
        self._epoch, self._first, self._turns, self._numbers = -1, 0, np.empty(0, int), np.empty(0, int)

    def _batches_until(self, epoch: int) -> list[int]:
        """Batches of each bucket before an epoch."""
        return [epoch * len(members) // self.batch_size for members in self.members]

    def _enter(self, batch: int) -> None:
        """Make ready the epoch that a batch of the common stream lies in: whose turn is when."""
        epoch = batch * self.batch_size // sum(len(members) for members in self.members)
        while sum(self._batches_until(epoch + 1)) <= batch:  # the epoch's end may lag behind by what is left over
            epoch += 1
        before, after = self._batches_until(epoch), self._batches_until(epoch + 1)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        turns = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            np.random.default_rng((self.seed, epoch, 0, 1)).shuffle(turns)
        numbers = np.empty(len(turns), int)
        for group, first in enumerate(before):
            where = turns == group
            numbers[where] = first + np.arange(where.sum())
        self._epoch, self._first, self._turns, self._numbers = epoch, sum(before), turns, numbers

    def _position(self, group: int, place: int) -> int:
        """Picture at a place of a bucket's endless stream."""
        members = self.members[group]
        epoch, place = divmod(place, len(members))
        if self._orders.get(group, (-1, None))[0] != epoch:
            key = (self.seed, epoch, group) if group else (self.seed, epoch)
            self._orders[group] = epoch, np.random.default_rng(key).permutation(len(members))
        return int(members[self._orders[group][1][place]])

    def batch(self, number: int) -> list[tuple[int, int]]:
        """A batch of the common stream."""
        if not self._first <= number < self._first + len(self._turns):
            self._enter(number)
        place = number - self._first
        group, own = int(self._turns[place]), int(self._numbers[place])
        return [
            (self._position(group, own * self.batch_size + i), number * self.batch_size + i)
            for i in range(self.batch_size)
        ]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(len(self)):
            yield self.batch(self.before + step * self.ranks + self.rank)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def training_loader(
    dataset: Any, batches: Batches, *, num_workers: int, collate_fn: Any = collate
) -> Iterator[dict[str, Any]]:
    """Batches of a dataset in order. What workers had to skip is told to the dataset of this process."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_fn)  # type: ignore[arg-type]
    for batch in loader:
        if isinstance(batch, dict) and "skipped" in batch:
            dataset.skipped.update(batch["skipped"])
        yield batch
