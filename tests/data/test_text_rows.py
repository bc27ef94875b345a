"""Prompt embeddings in the cache: without padding, in a precision that holds them, read in the loader's workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from davae.data.batches import Batches, training_loader
from davae.data.latent_cache.meta import seal
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.data.latent_cache.shard_files import CacheShard, save_shard
from davae.data.latent_cache.text_rows import TextShard, bits_of, packed
from davae.data.latent_cache.write import ChannelStatistics, merge_index, merged_meta, save_latents, write_text
from davae.errors import DataError
from davae.tasks.conditioning import BatchCaption, TextConditioning, of_batch

LENGTH, WIDTH = 12, 3


def embed(captions: list[str], scale: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states of as many tokens as a caption has characters, padded with zeros; their mask; a pooled output."""
    states, mask = torch.zeros(len(captions), LENGTH, WIDTH), torch.zeros(len(captions), LENGTH)
    pooled = torch.zeros(len(captions), 2)
    for row, caption in enumerate(captions):
        for place, letter in enumerate(caption):
            states[row, place] = scale * (ord(letter) + torch.arange(WIDTH) / 7)
            mask[row, place] = 1
        pooled[row] = len(caption)
    return states, mask, pooled


def cache(
    folder: Path, captions: list[str], scale: float = 1.0, dtype: str = "float16", **options: Any
) -> CachedLatents:
    folder.mkdir(parents=True, exist_ok=True)
    latents = np.random.default_rng(0).normal(size=(len(captions), 2, 2, 2)).astype("float16")
    statistics = ChannelStatistics(2)
    statistics.update(torch.from_numpy(latents).float())
    save_latents(folder, 0, 0, latents, captions, [None] * len(captions), statistics, {})
    merge_index(folder)
    encode = lambda texts: embed(texts, scale)  # noqa: E731
    seal(folder, write_text(folder, encode, merged_meta(folder, {}), batch_size=4, dtype=dtype))
    return CachedLatents(folder, **options)


CAPTIONS = ["rose", "a", "twelve chars", "", "rose", "two words"]


def test_padding_is_not_stored_and_comes_back(tmp_path: Path):
    found = cache(tmp_path / "c", CAPTIONS)
    asked = [*CAPTIONS, ""]
    for part, expected in zip(found.embed(asked), embed(asked), strict=True):
        assert torch.equal(part, expected.half().float())
        assert part.dtype == torch.float32
    shard = CacheShard(tmp_path / "c" / "text-00000.safetensors")
    tokens = sum(max(1, len(caption)) for caption in set(CAPTIONS))
    assert shard.file.get_tensor("part_0").shape == (tokens, WIDTH), "each distinct caption once, its tokens alone"


def test_full_rows_are_stored_as_before(tmp_path: Path):
    found = cache(tmp_path / "c", ["twelve chars", "twelve CHARS"] * 2, dtype="float32")
    assert CacheShard(tmp_path / "c" / "text-00000.safetensors").tensor("part_2").shape == (3, 2)
    assert torch.equal(found.embed(["twelve CHARS"])[0], embed(["twelve CHARS"])[0])


def test_values_beyond_float16_are_bfloat16_and_never_infinite(tmp_path: Path):
    found = cache(tmp_path / "c", CAPTIONS, scale=1e4)
    (states, mask, pooled), (expected, *others) = found.embed(CAPTIONS), embed(CAPTIONS, 1e4)
    assert float(states.max()) > 65504
    assert torch.isfinite(states).all()
    assert torch.equal(states, expected.bfloat16().float())
    assert torch.equal(mask, others[0])
    assert torch.equal(pooled, others[1])
    assert found.meta.skipped == {}


@pytest.mark.parametrize("length", [0, 1, 5])
def test_rows_of_any_length(tmp_path: Path, length: int):
    values = np.zeros((3, 5, 2), np.float32)
    values[1, :length] = 1.5
    tensors, bad = packed([values], "float16")
    save_shard(tmp_path / "s.safetensors", tensors)
    shard = TextShard(tmp_path / "s.safetensors")
    assert not bad
    for row in range(3):
        assert np.array_equal(shard.row(row)[0].numpy(), values[row].astype("float16"))


def test_bits_round_as_torch_does():
    values = np.asarray([0.0, -1.5, 3.14159, 1e30, 65505.0, -1e-20], np.float32)
    kept = (bits_of(values).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(kept, torch.from_numpy(values).bfloat16().float().numpy())


def test_a_damaged_row_is_named(tmp_path: Path):
    cache(tmp_path / "c", CAPTIONS)
    path = tmp_path / "c" / "text-00000.safetensors"
    data = bytearray(path.read_bytes())
    states = CacheShard(path).file.get_tensor("part_0").tobytes()
    data[data.index(states) + 1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"row \d of 'part_0' is not what was written"):
        CachedLatents(tmp_path / "c").embed(CAPTIONS)


def test_shards_of_earlier_versions_open(tmp_path: Path):
    part = np.arange(24, dtype="float16").reshape(2, 4, 3)
    save_file({"part_0": part, "part_1": np.ascontiguousarray(part[:, 0])}, tmp_path / "old.safetensors")
    first, second = TextShard(tmp_path / "old.safetensors").row(1)
    assert np.array_equal(first.numpy(), part[1])
    assert np.array_equal(second.numpy(), part[1, 0])


# -- reading in the workers ------------------------------------------------------------------------------------


class Call:
    """Keeps what a model would be given."""

    def predict(
        self, model: Any, config: Any, x_t: Tensor, t: Tensor, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return parts


def conditioning(found: Any) -> TextConditioning:
    made = TextConditioning.__new__(TextConditioning)
    made.cache, made.device, made.call, made.config, made._null = found, torch.device("cpu"), Call(), {}, None
    return made


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_batches_bring_their_embeddings_and_dropped_captions_are_the_empty_one(
    tmp_path: Path, workers: int, scale: float
):
    found = cache(tmp_path / "c", CAPTIONS, scale, embedded=True)
    plain = CachedLatents(tmp_path / "c")
    order = Batches(len(found), 4, seed=0, start=0, stop=3)
    for batch in training_loader(found, order, num_workers=workers, collate_fn=collate_latents):
        told: list[Any] = of_batch(batch["conditions"], batch["text"])
        assert all(type(caption) is str for caption in batch["conditions"])
        told[2] = ""
        parts = conditioning(found).predict(None, torch.zeros(4), torch.zeros(4), told)  # type: ignore[arg-type]
        expected = plain.embed([str(caption) for caption in told])
        assert all(torch.equal(part, other) for part, other in zip(parts, expected, strict=True))


def test_nothing_is_looked_up_for_a_whole_batch(tmp_path: Path):
    found = cache(tmp_path / "c", CAPTIONS, embedded=True)
    batch = collate_latents([found[(index, 0)] for index in range(3)])

    class Closed:
        def embed(self, captions: list[str]) -> None:
            raise AssertionError("read in the training process")

    told = of_batch(batch["conditions"], batch["text"])
    assert isinstance(told[0], BatchCaption)
    conditioning(Closed()).parts(told)  # type: ignore[arg-type]


def test_captions_alone_where_nothing_is_embedded(tmp_path: Path):
    found = cache(tmp_path / "c", CAPTIONS)
    batch = collate_latents([found[(index, 0)] for index in range(3)])
    assert set(batch) == {"latents", "conditions"}
