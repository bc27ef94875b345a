"""Bytes on disk and reading time of a text cache, padded and with true lengths.

The captions are synthetic.

    python benchmarks/text_cache.py --captions 100000 --json docs/results/data/text_cache.json

Lengths are those of image captions, log-normal around 24 tokens, cut at the model's length. The encoder's output
is (tokens, width) with zeros behind the caption, and a mask; every tenth image repeats a caption. Batches are read as stage 2
reads them. The padded cache is written in the layout of earlier versions, which is still read.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from davae.data.batches import Batches, training_loader
from davae.data.latent_cache.caption_table import CaptionTable
from davae.data.latent_cache.meta import read_meta, seal
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.data.latent_cache.text_rows import TextShard
from davae.data.latent_cache.write import ChannelStatistics, merge_index, merged_meta, save_latents, write_text


class Prompts:
    """A text encoder's stand-in: hidden states that depend on the caption alone."""

    def __init__(self, tokens: int, width: int, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.tokens, self.table = tokens, generator.normal(size=(997, width)).astype(np.float16)

    def __call__(self, captions: list[str]) -> tuple[Tensor, ...]:
        states = np.zeros((len(captions), self.tokens, self.table.shape[1]), np.float16)
        mask = np.zeros((len(captions), self.tokens), np.float16)
        for row, caption in enumerate(captions):
            words = [hash_of(word) for word in caption.split()][: self.tokens]
            states[row, : len(words)] = self.table[words]
            mask[row, : len(words)] = 1
        return torch.from_numpy(states), torch.from_numpy(mask)


def hash_of(word: str) -> int:
    """Return a place in the table."""
    return sum(map(ord, word)) * 31 % 997


def captions_of(count: int, seed: int = 0) -> list[str]:
    """Return captions of many lengths, every tenth of which repeats the one before."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(np.exp(generator.normal(np.log(24), 0.7, count)), 3, 400).astype(int)
    found: list[str] = []
    for number, length in enumerate(lengths):
        if number % 10 == 9:
            found.append(found[-1])
            continue
        found.append(f"image {number} " + " ".join(f"w{v}" for v in generator.integers(0, 5000, length - 2)))
    return found


def write_latent_part(folder: Path, captions: list[str]) -> None:
    """Latents of one value, so that the figures are those of the text."""
    for number, first in enumerate(range(0, len(captions), 1024)):
        own = captions[first : first + 1024]
        latents = np.zeros((len(own), 1, 1, 1), np.float16)
        statistics = ChannelStatistics(1)
        statistics.update(torch.zeros(len(own), 1, 1, 1))
        save_latents(folder, number, 0, latents, own, [None] * len(own), statistics, {})
    merge_index(folder)


def padded_shards(folder: Path, encode: Prompts) -> None:
    """Rewrite the text shards in the format of earlier versions: full length, no checksums."""
    for name, _ in read_meta(folder).text:
        shard = TextShard(folder / name)
        rows = [shard.row(row) for row in range(len(shard.shard.file.get_tensor("part_1")))]
        parts = {f"part_{n}": torch.stack(kind).numpy() for n, kind in enumerate(zip(*rows, strict=True))}
        del shard
        save_file(parts, folder / name)


def text_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("text-*.safetensors"))


def read(folder: Path, batch: int, batches: int, *, embedded: bool, workers: int) -> float:
    """Return the milliseconds a batch of `batch` captions takes to read and to look up."""
    cache = CachedLatents(folder, embedded=embedded)
    order = Batches(len(cache), batch, seed=0, start=0, stop=batches)
    loader = training_loader(cache, order, num_workers=workers, collate_fn=collate_latents)
    next(loader)
    times = []
    for _ in range(batches - 1):
        started = time.perf_counter()
        found = next(loader)
        if not embedded:
            cache.embed(found["conditions"])
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times))


def measure(count: int, tokens: int, width: int, batch: int, batches: int) -> dict[str, Any]:
    """Return bytes and milliseconds a batch, before and after."""
    captions, encode = captions_of(count), Prompts(tokens, width)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_latent_part(folder, captions)
        started = time.perf_counter()
        seal(folder, write_text(folder, encode, merged_meta(folder, {}), batch_size=64, dtype="float16"))
        written = time.perf_counter() - started
        distinct = CaptionTable(folder).count
        after = {
            "bytes": text_bytes(folder),
            "ms_a_batch_in_process": read(folder, batch, batches, embedded=True, workers=0),
            "ms_a_batch_one_worker": read(folder, batch, batches, embedded=True, workers=1),
        }
        padded_shards(folder, encode)
        before = {
            "bytes": text_bytes(folder),
            "ms_a_batch_in_process": read(folder, batch, batches, embedded=False, workers=0),
        }
    return {
        "captions": count,
        "distinct": distinct,
        "tokens": tokens,
        "width": width,
        "batch": batch,
        "mean_tokens": float(np.mean([min(len(caption.split()), tokens) for caption in captions])),
        "padded": before,
        "true_lengths": after,
        "bytes_ratio": before["bytes"] / after["bytes"],
        "write_seconds": written,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--width", type=int, default=64, help="2304 is SANA's; bytes and time grow with it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    figures = measure(given.captions, given.tokens, given.width, given.batch, given.batches)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
