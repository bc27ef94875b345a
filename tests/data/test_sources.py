"""Pictures from everywhere: captions, classes, colour, what is refused, and a set with a hundred broken ones."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from conftest import picture, tiny_upgrade_recipe
from PIL import Image, ImageCms

from davae.data.captions.texts import choose
from davae.data.decoding import decode_image
from davae.data.images import ImageDataset, by_kind
from davae.data.options import SourceOptions
from davae.data.sources import open_source
from davae.data.survey import survey
from davae.errors import DataError, RecipeError, UnreadableImage
from davae.recipes import validate
from davae.runs.upgrade import Upgrade


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def swapped_profile() -> bytes:
    """sRGB with red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    entries = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = (slice(entries[tag] + 4, entries[tag] + 8) for tag in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


def test_colour_profiles_also_under_alpha() -> None:
    """Full red under the exchanged profile is sRGB's green, opaque or not."""
    profile = swapped_profile()
    plain = Image.new("RGB", (8, 8), (255, 0, 0))
    veiled = Image.merge("RGBA", [*plain.split(), Image.new("L", (8, 8), 255)])
    veiled.paste((255, 0, 0, 0), (0, 0, 4, 8))
    for image in (plain, veiled, plain.quantize()):
        found = decode_image(io.BytesIO(png(image, icc_profile=profile)), "blue")
        r, g, b = found.getpixel((6, 4))  # type: ignore[misc]
        assert r < 12
        assert g > 243
        assert b < 12
    assert decode_image(io.BytesIO(png(veiled, icc_profile=profile)), "blue").getpixel((1, 1)) == (0, 0, 255)
    broken = decode_image(io.BytesIO(png(plain, icc_profile=b"x" * 200)))
    assert broken.getpixel((1, 1)) == (255, 0, 0), "a profile that cannot be read is ignored"


def test_captions_by_weight() -> None:
    record = {"short": "a cat", "long": ["a black cat", "a cat at night"], "none": ""}
    weights = {"short": 1.0, "long": 3.0, "none": 50.0, "absent": 50.0}
    said = [choose(record, weights, np.random.default_rng(i)) for i in range(2000)]
    shares = {text: said.count(text) / 2000 for text in set(said)}
    assert shares == pytest.approx({"a cat": 0.25, "a black cat": 0.375, "a cat at night": 0.375}, abs=0.04)
    assert choose(record, weights, None) == "a black cat", "the heaviest, its first"
    assert choose({}, weights, None) == ""


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_json_captions_and_classes_beside_pictures(tmp_path: Path, kind: str) -> None:
    samples = {}
    for number in range(3):
        samples[f"{number}.png"] = png(picture(number))
        record = {"blip": f"blip {number}", "tags": ["one", "two"], "class": number + 4}
        samples[f"{number}.json"] = json.dumps(record).encode()
        samples[f"{number}.txt"] = f"alt {number}".encode()
    if kind == "folder":
        for name, data in samples.items():
            (tmp_path / name).write_bytes(data)
        name = str(tmp_path)
    else:
        write_tar(tmp_path / "a.tar", samples)
        name = str(tmp_path / "a.tar")
    assert open_source(name, 8).load(1)[1] == "alt 1"
    source = open_source(name, 8, SourceOptions(caption_key="blip", label_key="class"))
    assert (source.load(1)[1], source.label(1)) == ("blip 1", 5)
    several = open_source(name, 8, SourceOptions(caption_weights={"txt": 1, "tags": 1}))
    assert {several.load(1, np.random.default_rng(i))[1] for i in range(40)} == {"alt 1", "one", "two"}
    with pytest.raises(DataError, match="has the key 'blop'; found blip, class, tags"):
        open_source(name, 8, SourceOptions(caption_key="blop"))
    with pytest.raises(DataError, match=r"data\.caption_column has no meaning for"):
        open_source(name, 8, SourceOptions(caption_column="text"))
    before = source.identity(1)
    samples["1.json"] = samples["1.json"].replace(b"blip 1", b"blop 1")
    if kind == "folder":
        (tmp_path / "1.json").write_bytes(samples["1.json"])
    else:
        write_tar(tmp_path / "a.tar", samples)
    assert open_source(name, 8, SourceOptions(caption_key="blip")).identity(1) != before


def write_parquet(path: Path, count: int) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"photo": [png(picture(i)) for i in range(count)], "alt": [f"alt {i}" for i in range(count)],
            "long": [[f"long {i}", f"longer {i}"] for i in range(count)], "kind": list(range(count))}  # fmt: skip
    parquet.write_table(pa.table(rows), path)


def test_parquet_with_image_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "a.parquet", 4)
    options = {"image_column": "photo", "label_column": "kind"}
    one = SourceOptions(**options, caption_column="alt")
    source = open_source(str(tmp_path / "a.parquet"), 8, one)
    assert (len(source), source.load(2)[1], source.label(2), source.size(2)) == (4, "alt 2", 2, (40, 36))
    several = SourceOptions(**options, caption_weights={"alt": 1, "long": 1})
    mixed = open_source(str(tmp_path), 8, several)  # a folder of parquet files
    assert {mixed.load(2, np.random.default_rng(i))[1] for i in range(40)} == {"alt 2", "long 2", "longer 2"}
    # streamed: copied row by row into shards, nothing else
    some = SourceOptions(**options, caption_column="alt", streaming=True, limit=3)
    stream = open_source(str(tmp_path / "a.parquet"), 8, some)
    assert (len(stream), stream.load(2)[1], stream.label(2)) == (3, "alt 2", 2)
    assert np.array_equal(np.asarray(stream.load(2)[0]), np.asarray(source.load(2)[0]))


def test_streams_go_on_at_their_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from davae.data.shards import remote

    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "SHARD_SIZE", 2)
    write_parquet(tmp_path / "a.parquet", 5)
    options = SourceOptions(image_column="photo", caption_column="alt", streaming=True, limit=5)
    open_source(str(tmp_path / "a.parquet"), 8, options)
    shards = sorted((tmp_path / "cache").rglob("*.tar"))
    assert len(shards) == 3
    first = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    source = open_source(str(tmp_path / "a.parquet"), 8, options)
    assert [source.load(i)[1] for i in range(5)] == [f"alt {i}" for i in range(5)]
    assert shards[0].stat().st_mtime_ns == first
    with pytest.raises(DataError, match=r"gave 5 images, data\.limit is 9"):
        open_source(str(tmp_path / "a.parquet"), 8, SourceOptions(**{**options.__dict__, "limit": 9}))


def test_shards_behind_commands_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        write_tar(tmp_path / f"s-{number}.tar", {"x.png": png(picture(number)), "x.txt": f"text {number}".encode()})
        with fsspec.open(f"memory://davae/s-{number}.tar", "wb") as stream:
            stream.write((tmp_path / f"s-{number}.tar").read_bytes())  # type: ignore[union-attr]
    for name in (f"pipe:cat {tmp_path}/s-{{0..1}}.tar", "memory://davae/s-{0..1}.tar", "memory://davae/s-*.tar"):
        source = open_source(name, 8)
        assert [source.load(i)[1] for i in range(2)] == ["text 0", "text 1"], name
    copies = sorted((tmp_path / "cache" / "shards").rglob("*.tar"))
    assert len(copies) == 4, "each address once"
    (tmp_path / "s-0.tar").unlink()
    assert len(open_source(f"pipe:cat {tmp_path}/s-0.tar", 8)) == 1, "the copy serves"
    for name, message in (
        (f"pipe:cat {tmp_path}/none.tar", "cannot read pipe:"),
        ("memory://davae/none-{0..1}.tar", "cannot read memory://davae/none-0.tar"),
        ("memory://davae/none-*.tar", "no shard matches"),
        ("pipe:head -c 700 " + str(tmp_path / "s-1.tar"), "is not a whole tar file"),
        ("pipe:cat /dev/null", "is not a whole tar file"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(name, 8)
    assert sorted((tmp_path / "cache" / "shards").rglob("*.tar")) == copies, "nothing half is kept"


def test_a_folder_of_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"x.png": png(picture(0)), "x.txt": b"b"})
    write_tar(tmp_path / "a.tar", {"x.png": png(picture(1)), "x.txt": b"a"})
    source = open_source(str(tmp_path), 8)
    assert [source.load(i)[1] for i in range(2)] == ["a", "b"]
    picture(2).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"holds shards and loose images \(loose.png\)"):
        open_source(str(tmp_path), 8)


def break_pictures(folder: Path, each: int) -> dict[str, int]:
    """Ten kinds of broken picture, `each` of every kind; the kinds as davae calls them."""
    frames = [picture(i, 40, 40) for i in range(3)]
    corrupt = bytearray(png(picture(1, 64, 64)))
    corrupt[len(corrupt) // 2 : len(corrupt) // 2 + 40] = b"\0" * 40
    moving, bomb = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    kinds: dict[str, tuple[str, bytes]] = {
        "empty file": ("jpg", b""),
        "truncated": ("jpg", jpeg(picture(2, 64, 64).convert("CMYK"))[:700]),
        "not an image": ("png", b"<html>404 not found</html>"),
        "damaged": ("png", bytes(corrupt)),
        "too many pixels": ("png", bomb.getvalue()),
        "damaged metadata": ("jpg", jpeg(picture(3), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")),
        "too small": ("png", png(Image.new("RGB", (1, 1)))),
        "animation": ("gif", moving.getvalue()),
    }
    for kind, (suffix, data) in kinds.items():
        for number in range(each):
            (folder / f"bad {kind} {number}.{suffix}").write_bytes(data)
    for number in range(each):
        (folder / f"bad missing {number}.jpg").symlink_to(folder / "nowhere.jpg")
        loop = folder / f"bad loop {number}.jpg"
        loop.symlink_to(loop)
    return {**dict.fromkeys(kinds, each), "missing file": each, "cannot be opened": each}


def test_a_thousand_pictures_of_which_a_hundred_are_broken(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(900):
        (folder / f"good {number}.png").write_bytes(png(picture(number, 36, 33), compress_level=1))
    expected = break_pictures(folder, 10)
    assert len(expected) == 10
    values = tiny_upgrade_recipe(
        tiny_base,
        folder,
        data__holdout=0.0,
        stage1={"max_steps": 1, "batch_size": 2, "lambda_lpips": 0.0, "lambda_adv": 0.0},
        cache={"batch_size": 50},
    )
    run = Upgrade(validate(values, "tiny"), tmp_path / "out", lambda progress: None)  # type: ignore[arg-type]
    run.train_vae()
    run.cache_latents()
    from davae.data.latent_cache.read import CachedLatents

    assert len(CachedLatents(tmp_path / "out" / "cache")) == 900
    summary = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert summary["used"] == 900
    assert summary["left_out"] == expected
    assert sorted(name for names in summary["names"].values() for name in names) == sorted(
        path.name for path in folder.iterdir() if path.name.startswith("bad")
    )
    for kind in expected:
        assert f"10 {kind} (" in caplog.text
    assert {kind: len(names) for kind, names in by_kind(run.skipped).items()} == expected


def test_worker_processes_tell_what_they_skipped(tmp_path: Path) -> None:
    from davae.data.batches import Batches, training_loader

    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "cut.jpg").write_bytes(jpeg(picture(0, 64, 64))[:500])
    source = open_source(str(tmp_path), 32)
    pictures = ImageDataset(source, range(7), 32)
    loader = training_loader(pictures, Batches(7, 7, seed=0, start=0, stop=1), num_workers=1)
    assert [len(batch["indices"]) for batch in loader] == [7]
    assert set(pictures.skipped) == {"cut.jpg"}


def test_forked_workers_read_a_tar_that_is_open_already(tmp_path: Path) -> None:
    from davae.data.batches import Batches, training_loader

    write_tar(tmp_path / "a.tar", {f"{number:03}.png": png(picture(number)) for number in range(200)})
    pictures = ImageDataset(open_source(str(tmp_path / "a.tar"), 32), range(200), 32)
    expected = torch.stack([pictures[(number, -1)]["image"] for number in range(200)])  # leaves the file open
    for batch in training_loader(pictures, Batches(200, 8, seed=0, start=0, stop=50), num_workers=4):
        assert torch.equal(batch["images"], expected[batch["indices"]])


def test_limits_of_pixels_and_crops(tmp_path: Path) -> None:
    picture(0, 100, 50).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"none of the 1 images can be used; 1 left out: 1 too many pixels \(a.png\)"):
        survey(open_source(str(tmp_path), 8, SourceOptions(max_pixels=4999)), [0], [(8, 8)])
    with pytest.raises(UnreadableImage, match=r"100x50, the limit data\.max_pixels is 4999"):
        decode_image(tmp_path / "a.png", max_pixels=4999)
    source = open_source(str(tmp_path), 8)
    random = ImageDataset(source, [0], 50, crop="random")
    crops = {tuple(random[(0, draw)]["image"].flatten()[:50].tolist()) for draw in range(6)}
    assert len(crops) > 3
    assert torch.equal(random[(0, -1)]["image"], ImageDataset(source, [0], 50)[(0, 3)]["image"]), (
        "plain is the centre"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"caption_key": "a", "caption_weights": {"b": 1.0}}, "give caption_weights, or one caption_key"),
        ({"caption_weights": {"b": 0.0}}, "data.caption_weights.b"),
        ({"streaming": True}, "streaming needs limit"),
        ({"buckets": {"max_ratio": 0.5}}, "data.buckets.max_ratio"),
        ({"max_pixels": 10**9}, "data.max_pixels"),
    ],
)
def test_data_options_that_cannot_be(data: dict, message: str, tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        validate({**tiny_upgrade_recipe(tiny_base, tiny_base), "data": data}, "x")


def test_a_small_image_of_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG's metadata lie at both ends: two reads of a file that fits into them cost more than the file."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, size in (("small.png", 40_000), ("large.png", 1 << 20)):
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(buffer.getvalue().ljust(size, b"\0")))
    source = open_source(str(tmp_path / "a.tar"), 8)
    read: list[int] = []
    monkeypatch.setattr(os, "pread", lambda f, n, at, real=os.pread: read.append(len(d := real(f, n, at))) or d)
    assert (source.size(0), sum(read)) == ((9, 8), 40_000)
    read.clear()
    assert source.size(1) == (9, 8)
    assert sum(read) < 1 << 18
