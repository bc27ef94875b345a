"""`davae bench scale`: start-up, memory and items a second of a latent cache by its size."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from davae.data.batches import Batches, training_loader
from davae.data.latent_cache.meta import CacheMeta, seal
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.data.latent_cache.shard_plan import shard_rows
from davae.data.latent_cache.write import ChannelStatistics, merge_index, merged_meta, save_latents, write_text
from davae.lab.bench.clock import in_own_process, machine, resident

SHAPE = (4, 4, 4)  # (c,h,w) of a latent; float16: 128 bytes
DTYPE = "float16"


def embed(captions: list[str]) -> tuple[Tensor]:
    """Return (N,1,4) values in place of text embeddings."""
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return (lengths.view(-1, 1, 1).expand(-1, 1, 4).contiguous(),)


def latents_of(first: int, last: int) -> np.ndarray:
    """Return latents (n,c,h,w) of items first to last-1, whose first value is the item's number."""
    values = np.random.default_rng(first).standard_normal((last - first, *SHAPE), np.float32)
    values[:, 0, 0, 0] = np.arange(first, last) % 2048
    return values.astype(DTYPE)


def write_synthetic(folder: Path, items: int, batch_size: int) -> CacheMeta:
    """Write a cache of random latents, each with its own caption, as every cache is written."""
    rows = shard_rows(items, batch_size)
    for number, first in enumerate(range(0, items, rows)):
        last = min(first + rows, items)
        latents = latents_of(first, last)
        statistics = ChannelStatistics(SHAPE[0])
        statistics.update(torch.from_numpy(latents).float())
        captions = [f"picture number {i}" for i in range(first, last)]
        save_latents(folder, number, 0, latents, captions, [None] * (last - first), statistics, {})
    merge_index(folder)
    meta = write_text(folder, embed, merged_meta(folder, {}), batch_size=1024, dtype=DTYPE)
    return seal(folder, meta)


def read_shuffled(folder: Path, batch_size: int, batches: int, num_workers: int) -> dict[str, float]:
    """Open a cache and read batches with text embeddings in the order of training.

    The process does nothing else.

    Returns:
        `start_seconds`: until the first batch is there. `items_per_second`: of all others. `own_mib`: private memory that
        opening took, `grown_mib`: what it grew by from the second batch to the last. `mapped_mib`: pages of the cache's files
        in memory at the end, which the system takes back when it needs them.
    """
    before = resident("RssAnon")
    started = time.perf_counter()
    cache = CachedLatents(folder)
    order = Batches(len(cache), batch_size, seed=0, start=0, stop=batches, groups=cache.groups)
    loader = training_loader(cache, order, num_workers=num_workers, collate_fn=collate_latents)

    def take(batch: dict[str, Any]) -> None:
        cache.embed(batch["conditions"])

    take(next(loader))
    ready = time.perf_counter()
    opened, mapped = resident("RssAnon"), resident("RssFile")
    for batch in islice(loader, 1):
        take(batch)
    warm, began, count = resident("RssAnon"), time.perf_counter(), 0
    for batch in loader:
        take(batch)
        count += len(batch["latents"])
    return {
        "start_seconds": ready - started,
        "items_per_second": count / (time.perf_counter() - began),
        "own_mib": (opened - before) / 2**20,
        "grown_mib": (resident("RssAnon") - warm) / 2**20,
        "mapped_mib": (resident("RssFile") - mapped) / 2**20,
    }


def bench_scale(items: list[int], *, batch_size: int, batches: int, num_workers: int) -> dict[str, Any]:
    """Return a row for each number of items, each read in a process of its own.

    Caches are written to a temporary folder.
    """
    rows: dict[str, Any] = {}
    for count in items:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            started = time.perf_counter()
            write_synthetic(folder, count, batch_size)
            written = time.perf_counter() - started
            size = sum(path.stat().st_size for path in folder.iterdir())
            figures = in_own_process(read_shuffled, folder, batch_size, batches, num_workers)
            rows[str(count)] = {"write_seconds": written, "disk_mib": size / 2**20, **figures}
    return {
        "batch_size": batch_size,
        "batches": batches,
        "num_workers": num_workers,
        "latent": list(SHAPE),
        "items": rows,
        "machine": machine(),
    }
