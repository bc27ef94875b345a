"""A recipe's pictures, opened: source, buckets, what trains and what is held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from davae.data.buckets import bucket_sizes, group_counts
from davae.data.cache_key import fingerprint, hash_pictures
from davae.data.captions import SourceOptions
from davae.data.pictures import DataError, Pictures, PictureSource, split, spread
from davae.data.sources import open_source, survey
from davae.recipes import RecipeError, check_source
from davae.recipes.sections import Data
from davae.train.ranks import compare, ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedData:
    """A recipe's pictures, looked through once: which train, which are held out, which are left out and why."""

    source: PictureSource
    sizes: list[tuple[int, int]]  # (width, height) of the buckets; one square without them
    train: list[int]
    groups: np.ndarray  # bucket of each training picture
    held_out: list[int]  # those that fill the square: what is measured is square
    left_out: dict[str, str]
    enlarge: bool = False  # small images are enlarged, as ADM prepares them

    def squares(self, indices: Sequence[int], seed: int = 0) -> Pictures:
        """Chosen images as squares, unaugmented options: for what is measured and shown."""
        return Pictures(self.source, indices, self.sizes[0][0], seed=seed, enlarge=self.enlarge)

    def shown(self, num: int) -> list[int]:
        """Return up to `num` held-out images that fill the square, spread over all of them; training images where none is."""
        indices = self.held_out or [
            i
            for i, g in zip(self.train, self.groups, strict=True)
            if self.enlarge or fills(self.source, i, self.sizes[0], int(g))
        ]
        return [indices[place] for place in spread(len(indices), num)]

    def pictures(self, data: Data, seed: int) -> Pictures:
        """The training pictures, in their buckets."""
        return Pictures(
            self.source,
            self.train,
            self.sizes[0][0],
            seed=seed,
            flip=data.flip,
            crop=data.crop,
            sizes=self.sizes,
            groups=self.groups,
            enlarge=data.enlarge,
        )


def source_options(data: Data) -> SourceOptions:
    return SourceOptions(**data.model_dump(include={field.name for field in fields(SourceOptions)}))


def open_pictures(data: Data, resolution: int, step: int | None = None) -> OpenedData:
    """The pictures of a recipe; those that fill no bucket are left out by name.

    Args:
        step: pixels that a token spans; None where a training takes squares alone.

    Raises:
        RecipeError: buckets where they cannot be, or a command that nobody typed.
        DataError: nothing there, nothing left, or other images in another process of the launch.
    """
    check_source(data.source)
    if data.buckets is not None and step is None:
        raise RecipeError("data.buckets: this model takes square pictures only; leave it out")
    source = open_source(data.source, resolution, source_options(data))
    sizes = [(resolution, resolution)]
    if data.buckets is not None:
        assert step is not None
        sizes = bucket_sizes(resolution, step, data.buckets.max_ratio, data.buckets.tokens)
    chosen = spread(len(source), data.limit)
    parts = split(source, data.holdout, chosen)
    found = survey(source, chosen, sizes, data.enlarge)
    held = set(parts.held_out)
    trains = np.asarray([index not in held for index in found.indices])
    if not trains.any():  # the only usable pictures are held out: rather train on them than fail
        trains = ~trains
        held = set()
    train = [index for index, own in zip(found.indices, trains, strict=True) if own]
    squares = [
        i
        for i, g in zip(found.indices, found.groups, strict=True)
        if i in held and (data.enlarge or fills(source, i, sizes[0], g))
    ]
    if len(sizes) > 1:
        logger.info("buckets: %s", group_counts(sizes, found.groups[trains]))
    opened = OpenedData(source, sizes, train, found.groups[trains], squares, found.left_out, data.enlarge)
    check_same_data(opened, data.source)
    return opened


def check_same_data(opened: OpenedData, name: str) -> None:
    """Compare the images of all processes of a launch before anything is computed from them; collective.

    Names, sizes in bytes, captions and the split are compared, not pixels.

    Raises:
        DataError: another process found other images.
    """
    if ranks() == 1:
        return
    indices = [*opened.train, *opened.held_out]
    digest = fingerprint(
        hash_pictures(opened.source, indices), len(opened.train), opened.groups.tolist(), sorted(opened.left_out)
    )
    differing = compare(digest)
    if not differing:
        return
    keys = compare([opened.source.key(index) for index in indices])
    (_, first_host, _), (other, host, _) = differing[:2]
    found = f"process {other} on {host} has images of other sizes, captions or buckets than process 0 on {first_host}"
    if keys:
        own, theirs = keys[0][2], keys[1][2]
        odd = sorted(set(own) ^ set(theirs))
        found = (
            f"process {other} on {host} found {len(theirs)} images, process 0 on {first_host} {len(own)}"
            f"{f'; {odd[0]!r} is in one alone' if odd else ', in another order'}"
        )
    raise DataError(
        f"data.source: {name}: {found}; give all processes the same files, on a shared disk or as equal copies"
    )


def fills(source: PictureSource, index: int, square: tuple[int, int], group: int) -> bool:
    """Whether a usable picture is large enough for the square; one whose bucket is the square is."""
    return group == 0 or min(source.size(index)) >= square[0]
