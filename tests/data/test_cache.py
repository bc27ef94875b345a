"""The latent cache: shards by any number of processes, exact statistics, resuming, staleness, buckets, scale."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, tiny_upgrade_recipe
from safetensors.torch import load_file

from davae.data.batches import Batches, training_loader
from davae.data.images import ImageDataset
from davae.data.latent_cache.meta import Team, read_meta, seal
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.shard_plan import planned_shards
from davae.data.latent_cache.write import (
    ChannelStatistics,
    merge_index,
    merged_meta,
    save_latents,
    write_latents,
    write_text,
)
from davae.data.sources import open_source
from davae.errors import DataError
from davae.recipes import Recipe, validate
from davae.runs.checks import check_buckets, check_recipe
from davae.runs.upgrade import Upgrade
from davae.tasks.base_model import BaseModel

KEY = {"autoencoder": "a", "data": "d"}


def encode(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, ::4, ::4] * 3


def embed(captions: list[str]) -> tuple[torch.Tensor, ...]:
    return torch.tensor([[[float(len(c)), 1.0]] for c in captions]), torch.tensor([[float(len(c))] for c in captions])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("many")
    for number in range(40):
        picture(number, 16, 16).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"number {number % 7}")
    (folder / "20.png").write_bytes(b"broken")
    return ImageDataset(open_source(str(folder), 16), range(40), 16, flip=True)


def write(folder: Path, pictures: ImageDataset, ranks: int, encoder: Any = encode) -> None:
    """`ranks` processes, here threads, that wait for each other."""
    barrier = Barrier(ranks)

    def wait() -> None:
        barrier.wait(60)

    def process(rank: int) -> None:
        team = Team(rank, ranks, wait)
        options: dict[str, Any] = {"batch_size": 4, "dtype": "float32", "team": team}
        meta = write_latents(folder, pictures, encoder, key=KEY, variants=3, **options)
        seal(folder, write_text(folder, embed, meta, **options), team)

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(process, range(ranks)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, pictures: ImageDataset) -> None:
    folders = [tmp_path / str(ranks) for ranks in (1, 2, 3)]
    for ranks, folder in enumerate(folders, 1):
        write(folder, pictures, ranks)
    first, *others = [content(folder) for folder in folders]
    assert sum(name.startswith("latents-") for name in first) == 8
    assert all(other == first for other in others)
    cache = CachedLatents(folders[0])
    assert len(cache) == 39 * 3
    assert cache.meta.skipped == {"20.png": "not an image: no format that Pillow knows"}
    # statistics equal those of all latents in one pass
    latents = (
        torch.tensor(np.stack([cache[(i, 0)][0] for i in range(len(cache))])).double().transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(
        torch.tensor(cache.meta.mean, dtype=torch.float64), latents.mean(1), rtol=1e-13, atol=1e-15
    )
    torch.testing.assert_close(
        torch.tensor(cache.meta.std, dtype=torch.float64), latents.std(1, unbiased=False), rtol=1e-13, atol=0
    )
    wide, pooled = cache.embed(["number 3", ""])
    assert wide.tolist() == [[[8.0, 1.0]], [[0.0, 1.0]]]
    assert pooled.tolist() == [[8.0], [0.0]]
    assert load_file(folders[0] / "text-00000.safetensors")["part_1"].shape == (8, 1), "each caption once, and none"
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again[(50, 0)][0], cache[(50, 0)][0])
    assert again[(50, 0)][1] == cache.captions[50]


def test_statistics_merged_in_parts_equal_one_pass() -> None:
    latents = torch.randn(31, 3, 2, 2, dtype=torch.float64) * torch.tensor([1.0, 1e3, 1e-3]).view(1, 3, 1, 1) + 1e4
    whole = latents.transpose(0, 1).flatten(1)
    merged = ChannelStatistics(3)
    for part in (latents[:5], latents[5:6], latents[6:]):
        own = ChannelStatistics(3)
        own.update(part)
        merged.merge(own.count, own.mean, own.squares)
    merged.merge(0, torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(merged.mean, whole.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(merged.std, whole.std(1, unbiased=False), rtol=1e-8, atol=0)


def test_an_interrupted_cache_goes_on_at_its_last_whole_shard(tmp_path: Path, pictures: ImageDataset) -> None:
    calls: list[int] = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", pictures, 1, encoder=counting)
    with pytest.raises(DataError, match="holds no whole latent cache"):
        CachedLatents(tmp_path / "a")
    (tmp_path / "a" / ".123.half.safetensors").write_bytes(b"half")
    assert len(list((tmp_path / "a").glob("latents-*"))) == 2
    write(tmp_path / "a", pictures, 1, encoder=counting)
    write(tmp_path / "b", pictures, 1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(calls) == 10 + 22, "of 30 batches 8 were in whole shards"


def test_a_stale_folder_is_made_again_and_says_why(
    tmp_path: Path, pictures: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, pictures, 1)
    options: dict[str, Any] = {"variants": 1, "batch_size": 4, "dtype": "float32"}
    write_latents(tmp_path, pictures, encode, key={**KEY, "data": "e"}, **options)
    assert "is made again: the images or their captions changed" in caplog.text
    assert not (tmp_path / "meta.json").exists()
    assert len(list(tmp_path.glob("latents-*"))) == 3


@pytest.fixture(scope="module")
def bucket_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for number in range(30):
        width, height = ((40, 36), (70, 24), (20, 66))[number % 3]
        picture(number, width, height).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {['red', 'blue'][number % 2]} square")
    return folder


def test_a_run_in_buckets(tiny_base: Path, bucket_folder: Path, tmp_path: Path) -> None:
    """32 px in 4x4 tokens: squares, 16x64 and 64x16, through both stages; then what makes its cache stale."""
    values = tiny_upgrade_recipe(tiny_base, bucket_folder, data__buckets={"max_ratio": 4}, data__holdout=0.2)
    recipe = validate(values, "tiny")
    run = Upgrade(recipe, tmp_path / "out", lambda progress: None)  # type: ignore[arg-type]
    run.run()
    cache = CachedLatents(run.out / "cache")
    shapes = {int(g): {cache[(int(i), 0)][0].shape for i in np.flatnonzero(cache.groups == g)} for g in range(3)}
    assert shapes == {0: {(12, 8, 8)}, 1: {(12, 16, 4)}, 2: {(12, 4, 16)}}
    assert all(min(run.opened.source.size(i)) >= 32 for i in run.opened.held_out), "what is measured is square"
    batches = Batches(len(cache), 2, seed=0, start=0, stop=20, groups=cache.groups)
    for batch in training_loader(cache, batches, num_workers=0, collate_fn=run.stage2_task().collate):
        assert batch["latents"][0, 0].numel() == 8 * 8
    run.folder.close()
    # the key: pictures, captions, autoencoder
    vae = run.vae()
    key = run.cache_key(vae)
    read_meta(run.out / "cache", key)
    with torch.no_grad():
        next(iter(vae.detail_encoder.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(DataError, match="is stale: the autoencoder's weights or config changed"):
        read_meta(run.out / "cache", run.cache_key(vae))
    names = {"flip": True, "crop": "random"}
    other = validate({**values, "data": {**values["data"], **names}}, "tiny")
    changed = Upgrade(other, tmp_path / "other", lambda progress: None).cache_key(run.vae())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"preprocessing \(data.crop: center -> random, data.flip: False -> True\)"):
        read_meta(run.out / "cache", changed)
    caption = bucket_folder / f"{run.opened.source.key(run.train[0]).removesuffix('.png')}.txt"
    caption.write_text("a new square")
    for step in ("stage2_task", "cache_latents"):  # a finished run, too
        with pytest.raises(DataError, match="is stale: the images or their captions changed; delete it"):
            getattr(Upgrade(recipe, run.out, lambda progress: None), step)()  # type: ignore[arg-type]


def test_class_models_take_squares(tiny_base: Path, bucket_folder: Path, tmp_path: Path) -> None:
    values = tiny_upgrade_recipe(tiny_base, bucket_folder, data__buckets={"max_ratio": 16})
    with pytest.raises(ValueError, match=r"gives 16 tokens in a row, .* knows positions up to 8; lower it"):
        Upgrade(validate(values, "tiny"), tmp_path / "out", lambda progress: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("data", r"^data\.buckets\.max_ratio: 16.* gives 16 tokens in a row"),
        ("stage2", r"^stage2\.data\.buckets\.max_ratio: 16.* gives 16 tokens in a row"),
        ("stage1", None),  # the autoencoder has no table of positions
    ],
)
def test_buckets_of_each_stages_own_images_are_checked(
    tiny_base: Path, bucket_folder: Path, section: str, message: str | None
) -> None:
    values = tiny_upgrade_recipe(tiny_base, bucket_folder)
    if section == "data":
        values["data"]["buckets"] = {"max_ratio": 16}
    else:
        values[section]["data"] = {**values["data"], "buckets": {"max_ratio": 16}}
    recipe = validate(values, "tiny")
    assert isinstance(recipe, Recipe)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_recipe(recipe, BaseModel(str(tiny_base)))
    square = BaseModel(str(tiny_base))
    square.shapes = replace(square.shapes, transformer_class="LightningDiT")
    with pytest.raises(ValueError, match=r"buckets: this model takes square images only"):
        check_buckets(recipe, square)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_hundred_thousand_items_open_at_once(tmp_path: Path) -> None:
    """Start-up and memory hang on shards, not on items; shuffled reading holds few files open."""
    rows, shards = 1000, 200
    statistics = ChannelStatistics(1)
    statistics.update(torch.zeros(1, 1, 1, 1))
    for number in range(shards):
        latents = (np.arange(rows, dtype=np.float32) + number * rows).reshape(rows, 1, 1, 1)
        captions = [f"caption {(number * rows + i) % 50_000}" for i in range(rows)]
        save_latents(tmp_path, number, 0, latents, captions, [1] * rows, statistics, {})
    merge_index(tmp_path)
    seal(tmp_path, merged_meta(tmp_path, KEY))
    before, began = open_files(), time.perf_counter()
    cache = CachedLatents(tmp_path)
    opened = time.perf_counter() - began
    assert len(cache) == rows * shards
    assert cache.captions.count == 50_001
    assert opened < 2
    for index in np.random.default_rng(0).integers(0, len(cache), 2000):
        latent, caption = cache[(int(index), 0)]
        assert latent.item() == index
        assert caption == f"caption {index % 50_000}"
    assert open_files() - before < 16
    assert cache.captions.row("caption 49999") > 0


def test_shards_are_planned_by_bucket() -> None:
    plans = planned_shards({0: 40, 3: 0, 7: 16}, batch_size=10)
    assert plans == [(0, 0, range(0, 20)), (0, 1, range(20, 40)), (7, 0, range(0, 16))]
    assert planned_shards({0: 100_000}, 16)[-1] == (0, 97, range(99_328, 100_000))
