"""`davae bench cache` and `data`: speed of writing and of reading a latent cache."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from davae.data.batches import Batches, chosen_workers, training_loader
from davae.data.latent_cache.meta import CacheMeta, check_cache, read_meta
from davae.runs.upgrade import Upgrade
from davae.train.loop import training_seed
from davae.train.random import SampleRandom

WARM_UP = 2  # steps that are not counted


def megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def cache_speed(run: Upgrade) -> dict[str, Any]:
    """Write the run's cache once more, next to its own, and time it.

    Returns:
        `items` (pictures times variants), `latents_seconds`, `captions_seconds`, `items_per_second` of encoding (pictures
        read and sized included), and megabytes that 1,000 items take, latents and text apart.
    """
    vae, folder = run.vae(), run.out / "bench-cache"
    if folder.exists():
        check_cache(folder)
        shutil.rmtree(folder)
    moments: dict[str, float] = {}
    run.observer = lambda progress: moments.update({progress.task: time.perf_counter()})
    started = time.perf_counter()
    run.write_cache(vae, folder, run.cache_key(vae))
    meta = read_meta(folder)
    seconds = moments["latents"] - started
    figures = {
        "items": meta.items,
        "latents_seconds": seconds,
        "items_per_second": meta.items / seconds,
        "captions_seconds": moments.get("captions", moments["latents"]) - moments["latents"],
        **cache_size(folder, meta),
    }
    shutil.rmtree(folder)
    return figures


def cache_size(folder: Path, meta: CacheMeta) -> dict[str, float]:
    """Return the megabytes on disk of 1,000 items, of latents and of text embeddings."""
    thousands = meta.items / 1000
    latents = [folder / name for name, _, _ in meta.shards]
    return {
        "latents_mb_per_1000": megabytes(latents) / thousands,
        "text_mb_per_1000": megabytes([folder / name for name, _ in meta.text]) / thousands,
        "index_mb_per_1000": megabytes(sorted(folder.glob("*.npy"))) / thousands,
    }


def step_speed(run: Upgrade, steps: int) -> dict[str, Any]:
    """Train some steps of stage 2 on the run's cache, and return how long they wait for data.

    Returns:
        `data_share`: waiting over all time; medians of the waits and of the steps, seconds; `images_per_second`.
    """
    task = run.stage2_task()
    settings, seed = task.settings, training_seed(run.recipe.stage2, run.recipe.run)
    optimizer = torch.optim.AdamW(task.trainables["transformer"].parameters.values(), lr=settings.lr)
    stop = steps + WARM_UP
    batches = Batches(
        len(task.dataset), settings.batch_size, seed=seed, start=0, stop=stop, groups=task.dataset.groups
    )
    loader = training_loader(
        task.dataset, batches, num_workers=run.recipe.stage2_data.num_workers, collate_fn=task.collate
    )
    waits, whole = [], []
    for step in range(stop):
        began = time.perf_counter()
        batch = next(loader)
        ready = time.perf_counter()
        draws = SampleRandom(seed, task.name, step, 0, settings.batch_size)
        loss, _ = task.loss("transformer", batch, step, draws)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # a device has caught up before the clock is read
        waits.append(ready - began)
        whole.append(time.perf_counter() - began)
    waits, whole = waits[WARM_UP:], whole[WARM_UP:]
    return {
        "steps": steps,
        "batch_size": settings.batch_size,
        "num_workers": chosen_workers(run.recipe.stage2_data.num_workers),
        "data_share": sum(waits) / sum(whole),
        "wait_seconds": statistics.median(waits),
        "step_seconds": statistics.median(whole),
        "images_per_second": settings.batch_size / statistics.median(whole),
    }
