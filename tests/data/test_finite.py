"""Latents and caption embeddings that are not finite: named, left out, counted; many of them end the step."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import load_file, save_file

from davae.data import decoding
from davae.data.images import ImageDataset
from davae.data.latent_cache.import_shards import import_shards
from davae.data.latent_cache.meta import seal
from davae.data.latent_cache.not_finite import stored
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.write import write_latents, write_text
from davae.data.sizes import measure_sizes
from davae.data.sources import open_source
from davae.errors import DataError

OPTIONS: dict[str, Any] = {"batch_size": 4, "dtype": "float16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images; the first pixel of each tells its number."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(40):
        image = picture(number, 16, 16)
        image.putpixel((0, 0), (number, 0, 0))
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"number {number}")
    return folder


def cache(
    target: Path,
    folder: Path,
    values: dict[int, float],
    bad_captions: dict[str, float] | None = None,
    num_workers: int = 0,
    embed: Any = None,
) -> CachedLatents:
    """A cache of latents in which some images' have one odd value, and of embeddings in which some captions' have."""
    pictures = ImageDataset(open_source(str(folder), 16), range(40), 16)

    def encode(images: torch.Tensor) -> torch.Tensor:
        latents = images[:, :, ::4, ::4] * 3
        for latent, image in zip(latents, images, strict=True):
            number = round((float(image[0, 0, 0]) + 1) * 127.5)
            latent[1, 2, 3] = values.get(number, float(latent[1, 2, 3]))
        return latents

    def embed_odd(captions: list[str]) -> tuple[torch.Tensor, ...]:
        odd = [(bad_captions or {}).get(caption, 0.5) for caption in captions]
        return torch.ones(len(captions), 3, 2), torch.tensor(odd)[:, None]

    meta = write_latents(target, pictures, encode, key={"data": "d"}, variants=2, num_workers=num_workers, **OPTIONS)
    meta = write_text(target, embed or embed_odd, meta, name_of=pictures.source.key, **OPTIONS)
    seal(target, meta)
    return CachedLatents(target)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_an_image_without_a_finite_latent_is_left_out_by_name(tmp_path: Path, folder: Path, odd: float) -> None:
    found = cache(tmp_path / "cache", folder, {7: odd, 31: odd})
    assert set(found.meta.skipped) == {"07.png", "31.png"}
    assert all(why.startswith("latent not finite: ") for why in found.meta.skipped.values())
    assert ("values beyond float16, up to 1e+06" in found.meta.skipped["07.png"]) == (odd == 1e6)
    assert len(found) == len(found.groups) == 2 * 38
    assert np.isfinite(found.meta.mean + found.meta.std).all()
    captions = [found[(item, 0)][1] for item in range(len(found))]
    assert sorted(captions) == sorted(2 * [f"number {n}" for n in range(40) if n not in (7, 31)])
    others = cache(tmp_path / "others", folder, {})
    for item, caption in enumerate(captions):
        same = next(i for i in range(len(others)) if others[(i, 0)][1] == caption)
        assert np.array_equal(found[(item, 0)][0], others[(same, 0)][0])


def test_a_caption_without_a_finite_embedding_leaves_its_image_out(tmp_path: Path, folder: Path) -> None:
    found = cache(tmp_path / "cache", folder, {3: float("nan")}, {"number 5": float("inf"), "number 9": 1e9})
    assert found.meta.skipped["05.png"] == "caption embedding not finite: 'number 5'"
    assert set(found.meta.skipped) == {"03.png", "05.png", "09.png"}
    assert len(found) == len(found.groups) == 2 * 37
    items = [found[(item, 0)] for item in range(len(found))]
    assert sorted(c for _, c in items) == sorted(2 * [f"number {n}" for n in range(40) if n not in (3, 5, 9)])
    for _, caption in items:
        assert all(torch.isfinite(part).all() for part in found.embed([caption]))


def test_many_of_them_end_the_step_and_a_mended_model_goes_on(tmp_path: Path, folder: Path) -> None:
    many = dict.fromkeys(range(0, 40, 4), float("nan"))
    with pytest.raises(
        DataError, match=r"cache: of \d+ images \d+ left out: \d+ latent not finite \(00\.png, .*bf16"
    ):
        cache(tmp_path / "cache", folder, many)
    with pytest.raises(DataError, match=r"cache: of 40 images 5 left out: 5 caption embedding not finite"):
        cache(tmp_path / "cache", folder, {}, {f"number {n}": float("nan") for n in range(5)})
    assert len(cache(tmp_path / "cache", folder, {})) == 80, "the shards that had them were made again"


@pytest.mark.parametrize(
    ("suffix", "number", "workers"),
    [("png", errno.EIO, 0), ("png", errno.EACCES, 1), ("png", errno.ENOENT, 0), ("txt", errno.EIO, 0)],
)
def test_a_disk_that_fails_for_a_while_ends_the_step_and_loses_no_image(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, number: int, workers: int
) -> None:
    """Of the 40 files all from the twentieth on fail, as those of one folder on another disk would."""
    path_open, open_image = Path.open, decoding.open_image

    def fail(path: Path) -> None:
        if path.suffix == f".{suffix}" and path.parent == folder and int(path.stem) >= 20:
            raise OSError(number, os.strerror(number))

    def opens(path: Path, *args: Any, **options: Any) -> Any:
        fail(path)
        return path_open(path, *args, **options)

    def opens_image(path: Path) -> Image.Image:
        fail(path)
        return open_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opens)
        patch.setattr(decoding, "open_image", opens_image)
        with pytest.raises(DataError) as caught:
            cache(tmp_path / "cache", folder, {}, num_workers=workers)
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith("run the same command again")
    assert "20." in line
    assert (tmp_path / "cache" / "latents-000-00000.safetensors").is_file()
    assert len(cache(tmp_path / "cache", folder, {})) == 80


def test_a_disk_that_fails_is_no_fault_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / "loose").mkdir()
    Image.effect_noise((300, 300), 50).save(tmp_path / "loose" / "0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "loose" / "0.png", "0.png")
    shard, loose = (open_source(str(tmp_path / name), 16) for name in ("a.tar", "loose"))
    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(decoding, "open_image", fails)
    for source, name in ((shard, "a.tar/0"), (loose, "0.png")):
        with pytest.raises(DataError, match=rf"{name} cannot be read: Stale .*; see to its disk"):
            measure_sizes(source, [0])


def test_rows_of_captions_follow_a_caption_that_comes_back(tmp_path: Path, folder: Path) -> None:
    """An image that fails and is mended adds a caption, and the step is done again without its meta."""

    def embed(captions: list[str]) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([[float(caption.removeprefix("number ") or -1)] for caption in captions]),)

    for bad in (7, 31, None):
        values = {} if bad is None else {bad: float("nan")}
        found = cache(tmp_path / "cache", folder, values, embed=embed)
        captions = [found[(item, 0)][1] for item in range(len(found))]
        assert [f"number {int(row)}" for row in found.embed(captions)[0]] == captions, bad
    for path in sorted((tmp_path / "cache").glob("text-*"))[1:]:  # as an earlier version wrote it, of other captions
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("captions")}
        save_file({name: tensor + 1 if name == "part_0" else tensor for name, tensor in tensors.items()}, path)
    found = cache(tmp_path / "cache", folder, {}, embed=embed)
    assert [f"number {int(row)}" for row in found.embed(captions)[0]] == captions


def test_the_empty_caption_must_have_an_embedding(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"the embedding of the empty caption, .* is not finite"):
        cache(tmp_path / "cache", folder, {}, {"": float("inf")})


def test_imported_latents_are_looked_at_too(tmp_path: Path) -> None:
    latents = torch.randn(40, 4, 2, 2)
    latents[3, 1, 0, 0] = float("nan")
    save_file({"latents": latents, "labels": torch.arange(40) % 3}, tmp_path / "latents_rank00_shard000.safetensors")
    meta = import_shards(tmp_path, tmp_path / "cache", channels=4, num_classes=3, key={}, dtype="float16")
    assert meta.items == 39
    assert list(meta.skipped) == ["latents_rank00_shard000.safetensors, latents[3]"]
    assert np.isfinite(meta.mean + meta.std).all()


def test_rows_are_judged_as_they_are_kept() -> None:
    kept, faults = stored(np.asarray([[1.0], [np.nan], [7e4], [-np.inf]], np.float32), "float16")
    assert [fault is None for fault in faults] == [True, False, False, False]
    assert kept.dtype == np.float16
    assert stored(np.asarray([[7e4]], np.float32), "float32")[1] == [None]
