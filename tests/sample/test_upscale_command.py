"""`davae upscale` and `davae sample --preview`: files, names, profiles, orientation, prompts, what is refused."""

from __future__ import annotations

import struct
import weakref
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, tiny_autoencoder
from PIL import Image, ImageCms
from typer.testing import CliRunner
from upgraded_tiny import assembled

from davae.backbones.lightning_dit import LightningDiT
from davae.cli import app
from davae.data.decoding import read_image
from davae.errors import DataError, DavaeError, ModelError, RunError
from davae.sample import upscale_files as upscaling
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.sample.open import SamplingOptions
from davae.sample.upscale import upscale
from davae.sample.upscale_files import find_images, read_source, save_result, upscale_files
from davae.vae.detail_vae import DetailVAE

OPTIONS = SamplingOptions(steps=2, guidance=1.0, seed=0, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path):
    return assembled(tiny_base)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # with the time, so once


def upright(path: Path) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_and_profile_are_kept_and_the_image_stays_upright(turn: int, tmp_path: Path):
    stored, exif = picture(turn, 12, 8), Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "in.png", exif=exif, icc_profile=PROFILE)
    source = read_source(tmp_path / "in.png")
    assert np.array_equal(np.asarray(source.image), np.asarray(upright(tmp_path / "in.png")))
    save_result(source.image, source, tmp_path / "out.png")
    written = Image.open(tmp_path / "out.png")
    assert written.size == stored.size
    assert written.getexif().get(0x0112, 1) == turn
    assert written.info["icc_profile"] == PROFILE
    assert np.array_equal(np.asarray(upright(tmp_path / "out.png")), np.asarray(source.image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb_without_a_profile_that_is_not_its_own(mode: str, tmp_path: Path):
    file = tmp_path / ("in.jpg" if mode == "CMYK" else "in.png")
    picture(1, 12, 8).convert(mode).save(file, icc_profile=PROFILE)
    source = read_source(file)
    assert (source.image.mode, source.profile) == ("RGB", None)


def grey_png(pixels: np.ndarray, bits: int, hidden: int, size: tuple[int, int] | None = None) -> bytes:
    """Return a PNG of few bits with a transparent value, whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + bytes((row[::2] << bits | row[1::2]).astype(np.uint8)) for row in pixels)
    header = struct.pack(">IIBBBBB", *(size or pixels.shape[::-1]), bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", struct.pack(">H", hidden)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_transparency_of_few_bits_is_read_as_everywhere_else(tmp_path: Path):
    pixels = np.arange(128).reshape(8, 16) % 16
    (tmp_path / "grey.png").write_bytes(grey_png(pixels, 4, 5))
    found = np.asarray(read_source(tmp_path / "grey.png").image)
    assert np.array_equal(found, np.asarray(read_image(tmp_path / "grey.png")))
    assert np.array_equal(found[..., 0], np.where(pixels == 5, 255, pixels * 17))


def test_a_missing_place_is_named_with_what_to_give(tmp_path: Path):
    with pytest.raises(DataError, match=r"nope: there is no such file or folder; give images, or folders of them$"):
        find_images([tmp_path / "nope"], tmp_path / "out")


def test_a_missing_class_is_one_line_before_any_image_is_drawn(tmp_path: Path):
    model = LightningDiT(
        input_size=8, patch_size=1, in_channels=12, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )  # fmt: skip
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    pipeline = ClassConditionalPipeline(vae, model, class_names=["cat", "dog", "cow"])
    for name, words in (("a", "cat"), ("b", "cat"), ("c", "")):
        picture(1, 16, 16).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(words)
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"c.png: no class; give --prompt, or write it into c.txt"):
        upscale_files(pipeline, find_images([tmp_path], out), out, OPTIONS)
    (tmp_path / "c.txt").write_text("crow")
    with pytest.raises(ModelError, match="'crow' is not a class of this model"):
        upscale_files(pipeline, find_images([tmp_path], out), out, OPTIONS)
    assert not out.exists()


def test_files_of_a_folder_become_files_of_the_same_names(pipeline, tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "a" / "out"
    folder.mkdir()
    for number, name in enumerate(["one.jpg", "two.png", "three.webp"]):
        picture(number, 16 + number, 16).save(folder / name)
    (folder / "two.txt").write_text("a red\nsquare\n")
    jobs = find_images([folder], out)
    assert {job.source.name: job.prompt for job in jobs} == {
        "one.jpg": "",
        "two.png": "a red square",
        "three.webp": "",
    }
    steps = []
    sheet = upscale_files(pipeline, jobs, out, OPTIONS, on_step=lambda done, total: steps.append(done / total))
    assert sorted(p.name for p in out.iterdir()) == ["before-after.png", "one.png", "three.png", "two.png"]
    assert Image.open(out / "three.png").size == (36, 32)
    assert steps[-1] == 1.0
    assert steps == sorted(steps)
    assert Image.open(sheet).size == (2 * 36 + 4, 3 * 36 + 2 * 4)  # cells as large as the largest result
    before = (out / "two.png").read_bytes()
    upscale_files(pipeline, find_images([folder / "two.png"], tmp_path / "alone"), tmp_path / "alone", OPTIONS)
    assert (tmp_path / "alone" / "two.png").read_bytes() == before  # whatever lies around it


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_interrupted_command_goes_on(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four of five images are there, the last of them cut by a crash."""
    images, out = [tmp_path / f"{number}.png" for number in range(5)], tmp_path / "out"
    for number, image in enumerate(images):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(number, 16, 14 + number).save(image, icc_profile=PROFILE, exif=exif)
    drawn: list[int] = []

    def counted(pipe: Any, sources: list[Image.Image], *args: Any, **options: Any) -> list[Image.Image]:
        drawn.append(len(sources))
        return upscale(pipe, sources, *args, **options)

    monkeypatch.setattr(upscaling, "upscale", counted)

    def stop(done: int, total: int) -> None:
        if 5 * done > 4 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_files(pipeline, find_images(images, out), out, OPTIONS, weights="a", on_step=stop)
    assert sorted(file.name for file in out.iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    (out / "3.png").write_bytes((out / "3.png").read_bytes()[:-9])
    drawn.clear()
    before = {number: (out / f"{number}.png").stat().st_mtime_ns for number in range(3)}
    upscale_files(pipeline, find_images(images, out), out, OPTIONS, weights="a")
    assert drawn == [2, 1]
    assert before == {number: (out / f"{number}.png").stat().st_mtime_ns for number in range(3)}
    whole = tmp_path / "whole"
    upscale_files(pipeline, find_images(images, whole), whole, OPTIONS, weights="a")
    assert written(out) == written(whole)

    drawn.clear()
    one = images[:1]
    for options in ({"weights": "b"}, {"weights": "a", "strength": 0.5}, {"weights": "a", "faithful": False}):
        with pytest.raises(
            RunError,
            match=r"0\.png: made from another input, prompt, model or options, or by another davae; use another --out",
        ):
            upscale_files(pipeline, find_images(one, out), out, OPTIONS, **options)
    for rule, value in (("LATENT_PASSES", 0), ("PROJECTION", 1)):
        with monkeypatch.context() as former:
            former.setattr(upscaling, rule, value)
            with pytest.raises(RunError, match="or by another davae"):
                upscale_files(pipeline, find_images(one, out), out, OPTIONS, weights="a")
    with pytest.raises(RunError, match="another input"):
        upscale_files(pipeline, find_images(one, out, "a red square"), out, OPTIONS, weights="a")
    with pytest.raises(RunError, match="another input"):
        upscale_files(pipeline, find_images(one, out), out, replace(OPTIONS, steps=3), weights="a")
    picture(7, 16, 14).save(images[0])
    with pytest.raises(RunError, match="another input"):
        upscale_files(pipeline, find_images(images, out), out, OPTIONS, weights="a")
    assert not drawn
    assert written(out) == written(whole)
    picture(8, 16, 16).save(tmp_path / "new.png")
    more = find_images([images[1], tmp_path / "new.png"], out)
    upscale_files(pipeline, more, out, replace(OPTIONS, batch_size=1), weights="a")
    assert drawn == [1], "an image more in the same folder"


def test_a_second_command_is_refused_while_one_writes(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both found the folder free of other results when they began."""
    picture(1, 16, 16).save(tmp_path / "one.png")
    out, tried = tmp_path / "out", []

    def enlarged(pipeline: Any, images: list[Image.Image], *arguments: Any, seed: int, **options: Any) -> Any:
        if not tried:
            tried.append(seed)
            with pytest.raises(RunError, match="out: another davae process writes here"):
                upscale_files(pipeline, find_images([tmp_path / "one.png"], out), out, replace(OPTIONS, seed=1))
        return [image.resize((32, 32)) for image in images]

    monkeypatch.setattr(upscaling, "upscale", enlarged)
    upscale_files(pipeline, find_images([tmp_path / "one.png"], out), out, OPTIONS)
    upscale_files(pipeline, find_images([tmp_path / "one.png"], out), out, OPTIONS)
    assert tried == [0]


def test_results_next_to_their_inputs_are_no_inputs(tmp_path: Path):
    for name in ("a.jpg", "b.webp"):
        picture(1, 16, 16).save(tmp_path / name)
    first = find_images([tmp_path], tmp_path)
    for job in first:
        save_result(picture(2, 32, 32), read_source(job.source), job.target, "mark")
    save_result(picture(3, 32, 32), read_source(tmp_path / "a.jpg"), tmp_path / upscaling.SHEET)
    assert find_images([tmp_path], tmp_path) == first
    (tmp_path / "b.png").unlink()
    picture(4, 16, 16).save(tmp_path / "b.png")
    with pytest.raises(RunError, match=r"b\.png: it exists and is not an image that davae wrote"):
        find_images([tmp_path], tmp_path)


def test_a_folder_of_results_is_enlarged_without_its_sheet_and_hidden_files(tmp_path: Path):
    folder = tmp_path / "results"
    folder.mkdir()
    picture(1, 16, 16).save(tmp_path / "source.png")
    source = read_source(tmp_path / "source.png")
    for name in ("a.png", upscaling.SHEET):
        save_result(picture(2, 32, 32), source, folder / name, "mark")
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them on other disks
    (folder / "folder.png").mkdir()
    assert [job.source.name for job in find_images([folder], tmp_path / "out")] == ["a.png"]
    picture(1, 16, 16).save(folder / upscaling.SHEET)  # somebody's own
    refused(DataError, "would become", [folder], tmp_path / "out")


def test_the_sheet_holds_one_pair_of_images_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(5):
        picture(number, 16, 16).save(tmp_path / f"{number}.png")
    jobs = [upscaling.ImageJob(tmp_path / f"{n}.png", tmp_path / f"{n}.png", "", (16, 16)) for n in range(5)]
    seen: list[weakref.ref[Image.Image]] = []

    def read(path: Path) -> upscaling.DecodedImage:
        assert sum(one() is not None for one in seen) < 4
        found = read_source(path)
        seen.append(weakref.ref(found.image))
        return found

    monkeypatch.setattr(upscaling, "read_source", read)
    assert upscaling._sheet(jobs).size[1] >= 5 * 16
    assert len(seen) == 10


def refused(kind: type[DavaeError], line: str, *arguments) -> None:
    with pytest.raises(kind, match=line):
        find_images(*arguments)


def test_what_cannot_be_enlarged_is_one_line_before_the_model_is_loaded(tmp_path: Path):
    good = tmp_path / "good.png"
    picture(1, 16, 16).save(good)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    refused(DataError, "bad.png: ", [tmp_path / "bad.png"], out)
    refused(DataError, "text.jpg: not an image", [tmp_path / "text.jpg"], out)
    refused(DataError, "no such file or folder", [tmp_path / "none.png"], out)
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    refused(
        DataError, "float.tiff: float pixels; save it with 8 or 16 bits a channel", [tmp_path / "float.tiff"], out
    )
    (tmp_path / "huge.png").write_bytes(grey_png(np.zeros((1, 2), int), 4, 0, size=(20_000, 20_000)))
    refused(DataError, "huge.png: too many pixels; reduce or cut it first", [tmp_path / "huge.png"], out)
    refused(DataError, "empty: no image", [tmp_path / "empty"], out)
    (tmp_path / "more").mkdir()
    picture(1, 16, 16).save(tmp_path / "more" / "good.png")
    refused(DataError, "would become", [good, tmp_path / "more"], out)
    assert len(find_images([good, good], out)) == 1
    refused(RunError, "this command reads it", [good], tmp_path)
    picture(1, 16, 16).save(tmp_path / "before-after.jpg")
    refused(DataError, "before-after.png", [tmp_path / "before-after.jpg"], out)
    (out).mkdir()
    picture(2, 8, 8).save(out / "good.png")
    refused(RunError, "is not an image that davae wrote", [good], out)
    (tmp_path / "good.txt").write_bytes(b"\xff\xfe\x00")
    refused(DataError, "good.txt begins as utf-16-le, but is not", [good], tmp_path / "other")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_prompts_are_read_in_any_encoding_that_captions_have(encoding: str, tmp_path: Path):
    picture(1, 16, 16).save(tmp_path / "image.png")
    (tmp_path / "image.txt").write_bytes("a café,\r\nred\n".encode(encoding))
    (job,) = find_images([tmp_path / "image.png"], tmp_path / "out")
    assert job.prompt == "a café, red"


def test_an_image_that_is_too_large_is_refused_before_any_work(pipeline, tmp_path: Path):
    Image.new("RGB", (4200, 4200)).save(tmp_path / "large.png")
    jobs = find_images([tmp_path / "large.png"], tmp_path / "out")
    with pytest.raises(ModelError, match=r"large.png: 4200x4200 pixels would become 8400x8400"):
        upscale_files(pipeline, jobs, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_leaves_the_results_before_it(pipeline, tmp_path: Path):
    for number in (1, 2):
        picture(number, 20, 16).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    jobs = find_images([tmp_path / "1.png", tmp_path / "2.png"], tmp_path / "out")
    with pytest.raises(DataError, match=r"2.png: "):
        upscale_files(pipeline, jobs, tmp_path / "out", replace(OPTIONS, batch_size=1))
    assert (tmp_path / "out" / "1.png").is_file()


def test_both_commands_run(model: Path, tmp_path: Path):
    picture(1, 10, 14).save(tmp_path / "image.png")
    words = ["upscale", str(model), str(tmp_path / "image.png"), "--out", str(tmp_path / "out"), "--steps", "2"]
    result = CliRunner().invoke(
        app, [*words, "--times", "2", "--prompt", "a", "--strength", "0.5"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "image.png").size == (40, 56)
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, RunError), "the prompt of the first command"
    words = [
        "sample",
        str(model),
        "a",
        "--num",
        "2",
        "--steps",
        "4",
        "--preview",
        "2",
        "--out",
        str(tmp_path / "drawn"),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (previews,) = (tmp_path / "drawn").glob("previews-*.png")
    assert Image.open(previews).size == (2 * 16 + 4, 2 * 16 + 4)
