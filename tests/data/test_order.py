"""The order of training: homogeneous buckets, nothing lost or repeated, whatever the processes and wherever it resumes."""

from __future__ import annotations

import numpy as np
import pytest

from davae.data.batches import Batches
from davae.data.buckets import LEAST_SHARE, bucket_sizes, nearest_bucket
from davae.data.survey import survey
from davae.errors import DataError, UnreadableImage
from davae.recipes import load_recipe


def stream(length: int, size: int, count: int, **options: object) -> list[list[tuple[int, int]]]:
    return list(Batches(length, size, seed=3, start=0, stop=count, **options))  # type: ignore[arg-type]


GROUPS = np.array([0, 2, 1, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1], np.int16)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_any_number_of_processes_draws_the_same_batches(ranks: int, groups: np.ndarray | None) -> None:
    length, size, steps = 19, 3, 14
    whole = stream(length, size * ranks, steps, groups=groups)
    parts = [stream(length, size, steps, rank=rank, ranks=ranks, groups=groups) for rank in range(ranks)]
    assert [[item for part in parts for item in part[step]] for step in range(steps)] == whole
    assert [draw for batch in whole for _, draw in batch] == list(range(steps * ranks * size))


def test_resumed_with_another_number_of_processes_nothing_is_lost_or_repeated() -> None:
    """Random sets and buckets, and a run that is stopped again and again and goes on with 1 to 8 processes."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        length, size = int(rng.integers(1, 80)), int(rng.choice([1, 2, 7, 8, 12, 24, 30, 35]))
        groups = rng.integers(0, int(rng.integers(1, 5)), length).astype(np.int16)
        seen: list[list[tuple[int, int]]] = []
        while len(seen) * size < 4 * length:
            ranks = int(rng.choice([r for r in range(1, 9) if size % r == 0]))
            stop = len(seen) + int(rng.integers(1, 5))
            common = {"seed": 5, "start": len(seen), "stop": stop, "ranks": ranks, "groups": groups}
            parts = [list(Batches(length, size // ranks, rank=rank, **common)) for rank in range(ranks)]
            seen += [[item for part in parts for item in part[step]] for step in range(len(parts[0]))]
        assert [draw for batch in seen for _, draw in batch] == list(range(len(seen) * size))
        for group in np.unique(groups):
            own = [position for batch in seen for position, _ in batch if groups[position] == group]
            members = np.flatnonzero(groups == group)
            for epoch in range(len(own) // len(members)):
                assert sorted(own[epoch * len(members) : (epoch + 1) * len(members)]) == members.tolist()
        assert all(len({groups[position] for position, _ in batch}) == 1 for batch in seen)


def test_buckets_come_in_proportion() -> None:
    groups = np.repeat(np.array([0, 1, 2], np.int16), [70, 20, 10])
    turns = [groups[batch[0][0]] for batch in stream(100, 5, 200, groups=groups)]
    for epoch in range(10):
        assert np.bincount(turns[epoch * 20 : (epoch + 1) * 20]).tolist() == [14, 4, 2]
    assert turns[:20] != turns[20:40], "their order is shuffled anew"


class Sizes:
    """A source of pictures that are all size."""

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes

    def key(self, index: int) -> str:
        return f"{index}.png"

    def size(self, index: int) -> tuple[int, int]:
        width, height = (int(v) for v in self.sizes[index])
        if not width:
            raise UnreadableImage("empty file")
        return width, height


@pytest.mark.parametrize("seed", range(4))
def test_a_1k_bucket_recipe_keeps_its_token_count(seed: int) -> None:
    recipe = load_recipe("sd35-medium-1k", ["data.buckets.max_ratio=16"])
    step, tokens = 8 * 2 * 2, 1024  # autoencoder factor, scale, patch
    sizes = bucket_sizes(recipe.resolution, step, recipe.data.buckets.max_ratio, recipe.data.buckets.tokens)  # type: ignore[union-attr]
    pictures = Sizes(np.random.default_rng(seed).integers(0, 5000, (3000, 2)))
    found = survey(pictures, range(3000), sizes)  # type: ignore[arg-type]
    for batch in stream(len(found.indices), 16, 300, groups=found.groups):
        shapes = {sizes[found.groups[position]] for position, _ in batch}
        assert len(shapes) == 1
        width, height = shapes.pop()
        assert (width // step) * (height // step) == tokens
        assert width % step == height % step == 0
        for position, _ in batch:
            own = pictures.size(found.indices[position])
            assert own[0] >= width, "never enlarged"
            assert own[1] >= height, "never enlarged"
    assert len(found.indices) + len(found.left_out) == 3000
    assert len(np.unique(found.groups)) == len(sizes) == 5


def test_bucket_sizes() -> None:
    assert bucket_sizes(1024, 32, 4.0) == [(1024, 1024), (512, 2048), (2048, 512)]
    assert bucket_sizes(960, 32, 2.3)[1:] == [(640, 1440), (800, 1152), (1152, 800), (1440, 640)]
    for resolution, step in ((1024, 32), (128, 16), (512, 32), (2048, 64)):
        total = (resolution // step) ** 2
        exact, most = (bucket_sizes(resolution, step, 3.0, tokens) for tokens in ("exact", "at_most"))
        assert set(exact) <= set(most)
        assert all(w * h == resolution**2 for w, h in exact)
        assert all(LEAST_SHARE * total <= w * h / step**2 <= total for w, h in most)
        assert all(max(w, h) <= 3 * min(w, h) for w, h in most)
    assert len(bucket_sizes(1024, 32, 2.0, "at_most")) > 9
    with pytest.raises(DataError, match="1000 pixels are not divisible by 32"):
        bucket_sizes(1000, 32, 2.0)


def test_a_picture_takes_the_nearest_bucket_that_it_fills() -> None:
    sizes = [(96, 96), (64, 144), (144, 64)]
    assert nearest_bucket(sizes, 96, 96) == 0
    assert nearest_bucket(sizes, 300, 100) == 2
    assert nearest_bucket(sizes, 100, 300) == 1
    assert nearest_bucket(sizes, 143, 96) == 0, "its own ratio would have to be enlarged"
    assert nearest_bucket(sizes, 90, 90) is None
