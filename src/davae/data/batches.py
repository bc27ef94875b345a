"""Order of training: the images of each batch, of each process, as a function of the seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from davae.data.images import collate


class Batches:
    """Batch number -> [(position, draw)], a pure function of the seed.

    Every epoch is a new permutation; batches run across epoch ends, so none is short. A batch is what all processes
    together train on: each takes its slice. So how many there are changes nothing while batch_size * ranks stays, also
    between two starts of a run, and starting at batch k gives what an uninterrupted run would have seen: no image of an
    epoch is repeated or lost.

    With buckets a batch holds images of one bucket. Bucket g with n_g images gives floor(e n_g / B) batches in the
    first e epochs, in an order shuffled by epoch; what is left over of an epoch comes first in the next.

    Args:
        length: images, or latents, in the set.
        batch_size: images of one process; B = batch_size * ranks.
        start, stop: batches that are already over, and the number to stop at.
        rank, ranks: this process and how many there are.
        groups: (length,) the bucket of each; None is one bucket.
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
        groups: np.ndarray | None = None,
    ):
        self.own_size, self.batch_size, self.seed = batch_size, batch_size * ranks, seed
        self.start, self.stop, self.rank = start, stop, rank
        labels = np.zeros(length, np.int16) if groups is None else groups
        self.labels = [int(group) for group in np.unique(labels)]
        self.members = [np.flatnonzero(labels == group) for group in self.labels]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> its epoch and permutation
        self._first, self._turns, self._numbers = 0, np.empty(0, int), np.empty(0, int)
        self._before: list[int] = []

    def _batches_until(self, epoch: int) -> list[int]:
        """Batches of each bucket before an epoch."""
        return [epoch * len(members) // self.batch_size for members in self.members]

    def _enter(self, batch: int) -> None:
        """Make ready the epoch that a batch lies in: whose turn is when."""
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
        self._first, self._turns, self._numbers, self._before = sum(before), turns, numbers, before

    def of_buckets(self) -> dict[int, int]:
        """Return how many of the batches before `stop` each bucket gives.

        A bucket with fewer images than a batch gives one once several epochs have gathered it, its images repeated.
        """
        if not self.stop:
            return dict.fromkeys(self.labels, 0)
        self._enter(self.stop - 1)
        part = np.bincount(self._turns[: self.stop - self._first], minlength=len(self.members))
        return {label: before + int(now) for label, before, now in zip(self.labels, self._before, part, strict=True)}

    def _position(self, group: int, place: int) -> int:
        """Return the image at a place of a bucket's endless stream."""
        members = self.members[group]
        epoch, place = divmod(place, len(members))
        if self._orders.get(group, (-1, None))[0] != epoch:
            key = (self.seed, epoch, group) if group else (self.seed, epoch)
            self._orders[group] = epoch, np.random.default_rng(key).permutation(len(members))
        return int(members[self._orders[group][1][place]])

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Return this process's slice of a batch."""
        if not self._first <= number < self._first + len(self._turns):
            self._enter(number)
        place = number - self._first
        group, own = int(self._turns[place]), int(self._numbers[place])
        first = self.rank * self.own_size
        return [
            (self._position(group, own * self.batch_size + i), number * self.batch_size + i)
            for i in range(first, first + self.own_size)
        ]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.stop):
            yield self.batch(number)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


class Passes:
    """Samples of one process, pass by pass, of batches that all processes divide among them.

    Args:
        length, batch_size, seed, groups: as for `Batches`; `batch_size` is the recipe's, of all processes.
        start, stop: of the recipe's batches.
        own: samples of a pass of this process; it divides `batch_size`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start: int,
        stop: int,
        own: int,
        rank: int = 0,
        ranks: int = 1,
        groups: np.ndarray | None = None,
    ):
        self.whole = Batches(length, batch_size, seed=seed, start=start, stop=stop, groups=groups)
        self.own, self.rank, self.ranks = own, rank, ranks
        self.places = range(start * batch_size + rank * own, stop * batch_size, ranks * own)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for place in self.places:
            number, first = divmod(place, self.whole.batch_size)
            yield self.whole.batch(number)[first : first + self.own]

    def __len__(self) -> int:
        return len(self.places)


MOST_WORKERS = 8  # beyond, they wait for the disk or for one another


def chosen_workers(given: int | None) -> int:
    """Return how many processes read data for one training process.

    A recipe's own number is taken as it is. None leaves one core to the training process and one to the system, and divides
    the rest over the processes of this machine: none on two cores, 8 at most. What is read does not depend on the number.
    """
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - 2))


def training_loader(
    dataset: Any, batches: Batches | Passes, *, num_workers: int | None, collate_fn: Any = collate
) -> Iterator[dict[str, Any]]:
    """Yield the batches of a dataset in order, and record in it what its workers skipped.

    Args:
        dataset: gives an item by (position, draw).
        batches: the items of each batch.
        num_workers: processes that read; None chooses by the cores.
        collate_fn: items -> batch.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=chosen_workers(num_workers),
        collate_fn=collate_fn,
    )
    for batch in loader:
        if isinstance(batch, dict) and "skipped" in batch:
            dataset.skipped.update(batch["skipped"])
        yield batch
