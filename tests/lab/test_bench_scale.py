"""`davae bench scale` reads what it wrote, in the order of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from davae.data.latent_cache import read as reading
from davae.data.latent_cache.read import CachedLatents
from davae.lab.bench.clock import in_own_process
from davae.lab.bench.scale import bench_scale, latents_of, write_synthetic


def test_the_synthetic_cache_is_a_cache_and_few_shards_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "OPEN_SHARDS", 2)
    meta = write_synthetic(tmp_path, 300, 16)
    assert (meta.items, len(meta.shards)) == (300, 19)
    cache = CachedLatents(tmp_path)
    for index in np.random.default_rng(0).permutation(300).tolist():
        latent, caption = cache[(index, 0)]
        assert (latent.shape, latent.dtype) == ((4, 4, 4), np.float16)
        assert float(latent[0, 0, 0]) == index
        assert caption == f"picture number {index}"
        assert len(cache.reader._open) <= 2
    latents = np.concatenate([latents_of(first, min(first + 16, 300)) for first in range(0, 300, 16)])
    np.testing.assert_allclose(meta.mean, latents.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    assert cache.embed(["picture number 7", ""])[0][:, 0, 0].tolist() == [16.0, 0.0]


def test_every_size_is_read_and_measured() -> None:
    figures = bench_scale([40, 3000], batch_size=8, batches=100, num_workers=0)
    for row in figures["items"].values():
        assert 0 < row["start_seconds"] < 10
        assert row["items_per_second"] > 100
        assert row["grown_mib"] < 8
    assert figures["items"]["3000"]["disk_mib"] > figures["items"]["40"]["disk_mib"] > 0


def fail() -> None:
    raise SystemExit(7)


def test_a_process_that_ends_without_an_answer_is_told() -> None:
    assert in_own_process(abs, -3) == 3
    with pytest.raises(RuntimeError, match="ended with status 7"):
        in_own_process(fail)
