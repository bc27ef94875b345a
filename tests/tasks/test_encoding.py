"""Encoding for the cache: the run's precision, fewer images when memory runs out, resumed with another batch size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_autoencoder
from PIL import Image
from torch import Tensor

from davae import DetailVAE
from davae.data.images import ImageDataset
from davae.data.latent_cache.meta import Team, seal
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.shard_plan import FLIPS, begun_with
from davae.data.latent_cache.write import write_latents
from davae.data.sources import open_source
from davae.dataset.encoding import Encoder
from davae.errors import DataError
from davae.recipes import differences, load_recipe
from davae.runs.validation import embedded_captions
from davae.tasks.conditioning import EmbeddedInStep, embed_in_step
from davae.train.locking import one_at_a_time
from davae.vae.codec import Codec


@pytest.fixture(scope="module")
def vae() -> DetailVAE:
    torch.manual_seed(0)
    return DetailVAE.from_base(tiny_autoencoder(), 8)


def images(count: int = 5) -> Tensor:
    found = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return found.contiguous(memory_format=torch.channels_last)


def test_float32_is_what_it_was_and_half_precision_is_near(vae: DetailVAE):
    with torch.no_grad():
        plain = Codec(vae).encode_raw(images())
    assert torch.equal(Encoder(vae, torch.float32, 16)(images()), plain)
    half = Encoder(vae, torch.bfloat16, 16)(images())
    assert half.dtype == torch.float32
    assert 0 < float((half - plain).std() / plain.std()) < 0.05
    assert next(vae.parameters()).dtype == torch.float32, "the autoencoder that is saved stays as it is"


def test_memory_that_runs_out_halves_the_batch_and_then_tiles(
    vae: DetailVAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    sizes: list[tuple[int, bool]] = []
    encode_raw = Codec.encode_raw

    def hungry(codec: Codec, batch: Tensor) -> Tensor:
        sizes.append((len(batch), codec.vae.use_tiling))
        if len(batch) > 1 or not codec.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_raw(codec, batch)

    monkeypatch.setattr(Codec, "encode_raw", hungry)
    encoder = Encoder(vae, torch.bfloat16, 4)
    found = encoder(images())
    assert sizes == [(4, False), (2, False), (1, False), *[(1, True)] * 5]
    vae.disable_tiling()
    monkeypatch.undo()
    torch.testing.assert_close(found, Encoder(vae, torch.bfloat16, 16)(images()), rtol=0, atol=0.05)
    assert "latent cache: out of memory" in caplog.text


def test_latents_that_overflow_in_float16_are_computed_again(
    vae: DetailVAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    encode_raw = Codec.encode_raw

    def overflowing(codec: Codec, batch: Tensor) -> Tensor:
        found = encode_raw(codec, batch)
        return found if found.dtype == torch.float32 else found * 1e6

    monkeypatch.setattr(Codec, "encode_raw", overflowing)
    found = Encoder(vae, torch.float16, 16)(images())
    with torch.no_grad():
        assert torch.equal(found, Codec(vae).encode_raw(images()))
    assert "overflow in float16" in caplog.text


def test_a_gpus_batch_comes_from_the_plan(vae: DetailVAE, monkeypatch: pytest.MonkeyPatch):
    """A stated amount of free memory stands for a GPU's."""
    for free, expected, tiled in ((10_000, 8, False), (2_000, 2, False), (100, 1, True)):
        monkeypatch.setattr("davae.dataset.encoding.free_bytes", lambda _, free=free: free)
        monkeypatch.setattr("davae.dataset.encoding.encode_bytes", lambda *options: 900 if len(options) == 3 else 90)
        encoder = Encoder(vae, torch.bfloat16, 8)
        encoder(images())
        assert (encoder.halving.size, encoder.own.use_tiling) == (expected, tiled)
        vae.disable_tiling()


def test_the_batch_size_may_change_on_a_run_that_exists():
    before = load_recipe("micro")
    for change in ("cache.batch_size=2", "data.num_workers=3", "report.batch_size=1", "report.holdout_pictures=3"):
        assert differences(before, load_recipe("micro", [change])) == []
    for change in ("cache.dtype=float32", "cache.text=step", "export.dtype=bfloat16", "cache.variants=2"):
        assert len(differences(before, load_recipe("micro", [change]))) == 1


def test_prompts_embedded_in_the_step_are_those_of_the_cache():
    asked: list[list[str]] = []

    def embed(captions: list[str]) -> tuple[Tensor, ...]:
        asked.append(captions)
        return (torch.tensor([[float(len(caption))] for caption in captions], dtype=torch.bfloat16),)

    (part,) = EmbeddedInStep(embed).embed(["aa", "", "aa", "bbb"])
    assert part.dtype == torch.float32
    assert part.tolist() == [[2.0], [0.0], [2.0], [3.0]]
    assert asked == [["aa", "", "bbb"]]


def test_a_second_prediction_of_a_step_embeds_nothing_again():
    calls: list[list[str]] = []
    embedded = EmbeddedInStep(lambda captions: calls.append(captions) or (torch.rand(len(captions), 2),))
    first, second, other = (embedded.embed(captions)[0] for captions in (["a", "b"], ["a", "b"], ["b", "a"]))
    assert torch.equal(first, second)
    assert calls == [["a", "b"], ["b", "a"]]
    assert embedded.asked == 4
    assert other.shape == first.shape


def overflowing(captions: list[str]) -> tuple[Tensor, ...]:
    """Two kinds of embeddings; the second is NaN for captions with 'nan', the first infinite for those with 'inf'."""
    long = (
        torch.ones(len(captions), 3, 2)
        * torch.tensor([float("inf") if "inf" in c else len(c) for c in captions])[:, None, None]
    )
    pooled = torch.tensor([[float("nan") if "nan" in c else len(c)] for c in captions])
    return long, pooled


def test_a_caption_whose_embedding_is_not_finite_is_named_once_and_trains_as_none(caplog: pytest.LogCaptureFixture):
    embedded = EmbeddedInStep(overflowing)
    for _ in range(2):
        long, pooled = embedded.embed(["abc", "a nan", "an inf", "a nan", "d"])
        assert long[:, 0, 0].tolist() == [3.0, 0.0, 0.0, 0.0, 1.0]
        assert pooled[:, 0].tolist() == [3.0, 0.0, 0.0, 0.0, 1.0]
    named = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(named) == 2
    assert "'a nan'" in named[0]
    assert "(2 so far)" in named[1]


def test_many_embeddings_that_are_not_finite_stop_the_step():
    embedded = EmbeddedInStep(overflowing)
    embedded.embed([f"nan {number}" for number in range(8)])  # never too many
    with pytest.raises(DataError, match="of 9 images"):
        embedded.embed(["nan 8"])
    rare = EmbeddedInStep(overflowing)
    rare.embed([f"{number}" for number in range(991)])
    rare.embed([f"nan {number}" for number in range(20)])


def test_an_empty_caption_whose_embedding_is_not_finite_stops_before_the_first_step():
    with pytest.raises(DataError, match="empty caption"):
        embed_in_step(SimpleNamespace(), lambda captions: (torch.full((len(captions), 2), float("nan")),))
    conditioning = SimpleNamespace()
    embed_in_step(conditioning, overflowing)
    assert conditioning.cache.embed(["ab"])[1].tolist() == [[2.0]]


def test_a_held_out_caption_that_is_not_finite_leaves_the_validation_loss_finite(caplog: pytest.LogCaptureFixture):
    """A NaN would keep every later step from being the best one, without a word."""
    loaded: list[str] = []

    def embedder() -> Any:
        loaded.append("text encoders")
        return overflowing

    captions = ["", "a nan", "abc"]
    stored = embedded_captions(SimpleNamespace(cache=None), captions, embedder, 2).embed(captions)
    assert stored[1].flatten().tolist() == [0.0, 0.0, 3.0]
    assert "'a nan'" in caplog.text
    own = SimpleNamespace(cache=EmbeddedInStep(overflowing))
    assert torch.equal(embedded_captions(own, captions, embedder, 2).embed(captions)[0], stored[0])
    assert loaded == ["text encoders"], "a run that embeds in its steps has them already"


def test_processes_of_a_machine_load_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process that holds the lock is waited for; a process on its own takes none."""
    from filelock import FileLock, Timeout

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with one_at_a_time(tmp_path / "run"):
        assert not list(tmp_path.glob("*.lock"))
    monkeypatch.setattr("davae.train.locking.ranks", lambda: 2)
    with one_at_a_time(tmp_path / "run"):
        (lock,) = tmp_path.glob("davae-load-*.lock")
        with pytest.raises(Timeout):
            FileLock(lock, timeout=0.01, is_singleton=False).acquire()
    FileLock(lock, timeout=0.01, is_singleton=False).acquire()
    assert os.path.exists(lock)


@pytest.mark.parametrize("flip", [True, False])
def test_an_interrupted_cache_of_drawn_flips_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flip: bool
):
    """One cache holds one rule of flips: shards that an earlier version began, which drew them, are not kept."""
    shard = tmp_path / "latents-0000-00000.safetensors"
    for known in ({"batch_size": 5}, {"batch_size": 5, "flips": "drawn"}, {"batch_size": 5, "flips": FLIPS}):
        caplog.clear()
        shard.write_bytes(b"")
        (tmp_path / "shards.json").write_text(json.dumps(known))
        kept = not flip or known.get("flips") == FLIPS
        assert begun_with(tmp_path, 7, 70, 2, Team(), flip=flip) == (5 if kept else 7)
        assert shard.exists() == kept
        assert ("by another rule" in caplog.text) == (not kept)


def test_an_interrupted_cache_goes_on_with_another_batch_size(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(70):
        Image.new("RGB", (16, 16), (3 * number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    pictures = ImageDataset(open_source(str(tmp_path), 16), range(70), 16)
    calls: list[int] = []

    def write(name: str, batch: int, *, stop: int = 10**6) -> dict[str, bytes]:
        def encode(batch: Tensor) -> Tensor:
            calls.append(len(batch))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return batch[:, :, ::4, ::4].mean(dim=(2, 3), keepdim=True)

        calls.clear()
        options: dict[str, Any] = {"key": {"data": "d"}, "variants": 2, "dtype": "float32"}
        seal(tmp_path / name, write_latents(tmp_path / name, pictures, encode, batch_size=batch, **options))
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}

    whole = write("whole", 5)
    with pytest.raises(KeyboardInterrupt):
        write("parts", 5, stop=12)
    parts = write("parts", 3)
    assert parts.keys() == whole.keys()
    first, second = CachedLatents(tmp_path / "whole"), CachedLatents(tmp_path / "parts")
    assert all((first[(item, 0)][0] == second[(item, 0)][0]).all() for item in range(140))
    assert first.meta.mean == pytest.approx(second.meta.mean, rel=1e-12)
    assert max(calls) == 3
    assert sum(calls) < 140, "whole shards were kept"
    old = tmp_path / "old"
    with pytest.raises(KeyboardInterrupt):
        write("old", 5, stop=12)
    (old / "shards.json").unlink()  # as an earlier version leaves it
    found = write("old", 3)
    assert "cache.batch_size changed" in caplog.text
    assert len(CachedLatents(old)) == 140
    assert {name for name in found if name.startswith("latents")} != {
        name for name in whole if name.startswith("latents")
    }
