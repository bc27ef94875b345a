"""What the page's tabs call, without a browser: bounds of uploads, the three ways to draw, faded detail, trainings."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cases import BUILDERS
from conftest import picture, tiny_upgrade_recipe
from PIL import Image

from davae.analyze.sensitivity import decode_faded, reconstructions
from davae.app import drawing, reconstructing
from davae.app.checkpoint_images import checkpoint_images, newest_images_of
from davae.app.inspection import inspection
from davae.app.pair import Pair, Stopped, open_pair
from davae.app.training import Trainings
from davae.app.uploads import MAX_BYTES, read_upload, store_images
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.errors import DataError, ModelError, RecipeError, RunError
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import assemble
from davae.recipes import dump_recipe, validate
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.vae.detail_vae import DetailVAE


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says width x height, and whose data is next to nothing: a decompression bomb's shape."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><script>alert(1)</script></svg>'
HOSTILE = {
    "square.png": (png_of(50_000, 50_000), "has more pixels than the page takes: 12,000 a side"),
    "thin.png": (png_of(50_000, 1), "is 50000x1, more pixels than the page takes"),
    "notes.jpg": (b"these are only words\n" * 50, "is not an image that can be read"),
    "drawing.svg": (SVG, "is not an image that can be read"),
    "drawing.png": (SVG, "is not an image that can be read"),
    "empty.png": (b"", "is not an image that can be read"),
    "cut.png": (png_of(64, 64), "truncated"),
    "large.png": (b"\0" * (MAX_BYTES + 1), "the page takes files up to 20 MiB"),
}


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Pair:
    """An upgraded pipeline in a run folder whose recipe names its base, opened by the folder's name."""
    run = tmp_path_factory.mktemp("app") / "run"
    base = load_pipeline(str(tiny_base))
    vae = DetailVAE.from_base(base.vae, 8)
    vae.set_detail_statistics(torch.linspace(-0.3, 0.3, 8), torch.linspace(0.5, 1.5, 8))
    assemble(base, vae, expand_transformer(base.transformer, 8)).save_pretrained(run / "pipeline")
    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder), "tiny")
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    return open_pair(str(run))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused_in_one_line(name: str, tmp_path: Path):
    content, says = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as refused:
        read_upload(tmp_path / name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_bad_upload_writes_nothing(tmp_path: Path):
    good, bad = tmp_path / "A cat!.png", tmp_path / "b.jpg"
    picture(0).save(good)
    (tmp_path / "A cat!.txt").write_text("a cat")
    bad.write_text("words")
    target = tmp_path / "set"
    with pytest.raises(DataError, match=r"b\.jpg"):
        store_images([good, bad], target)
    assert not target.exists()
    assert store_images([good, tmp_path / "A cat!.txt"], target) == 1
    assert sorted(path.name for path in target.iterdir()) == ["000-a-cat.png", "000-a-cat.txt"]


def test_three_ways_with_tokens_and_time(pair: Pair):
    drawn = list(
        drawing.draw(pair, "a red square", list(drawing.WAYS), seed=3, steps=2, guidance=2.0, stop=threading.Event())
    )
    assert [(d.way, d.tokens, d.drawn_at, d.image.size) for d in drawn] == [
        ("base, enlarged", 16, 16, (32, 32)),
        ("base, native", 64, 32, (32, 32)),
        ("upgraded", 16, 32, (32, 32)),
    ]
    assert all(d.seconds > 0 for d in drawn)
    assert "16 px, enlarged to 32 · 16 tokens" in drawn[0].note
    same = generate(pair.upgraded, ["a red square"], SamplingOptions(steps=2, guidance=2.0, seed=3))[0]
    assert np.array_equal(np.asarray(drawn[2].image), np.asarray(same))


def test_a_drawing_stops_between_two_steps(pair: Pair):
    stop, seen = threading.Event(), []

    def on_step(way: str, done: int, steps: int) -> None:
        seen.append(done)
        if done == 2:
            stop.set()

    with pytest.raises(Stopped):
        list(drawing.draw(pair, "x", ["upgraded"], seed=0, steps=50, guidance=1.0, stop=stop, on_step=on_step))
    assert max(seen) == 2
    assert len(pair.upgraded.transformer._forward_pre_hooks) == 0
    again = drawing.draw(pair, "x", ["upgraded"], seed=0, steps=1, guidance=1.0, stop=threading.Event())
    assert len(list(again)) == 1


def test_a_drawing_has_a_bound_on_time(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "MAX_SECONDS", 0)
    with pytest.raises(ModelError, match="a drawing may take 0 seconds; use fewer steps"):
        list(drawing.draw(pair, "x", ["upgraded"], seed=0, steps=50, guidance=1.0, stop=threading.Event()))
    assert len(pair.upgraded.transformer._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ways": ["upgraded", "other"]}, "an unknown way to draw"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "  "}, "needs a prompt"),
        ({"prompt": "x" * 501}, "501 characters"),
        ({"steps": 0}, "1 to 150"),
        ({"steps": 151}, "1 to 150"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"ways": []}, "at least one"),
    ],
)
def test_bounds_of_a_drawing(pair: Pair, changes: dict, says: str):
    values = {"prompt": "x", "ways": ["upgraded"], "seed": 0, "steps": 1, "guidance": 1.0, **changes}
    prompt, ways = values.pop("prompt"), values.pop("ways")
    with pytest.raises(ModelError, match=says):
        list(drawing.draw(pair, prompt, ways, stop=threading.Event(), **values))


def test_fading_the_detail_channels(pair: Pair):
    """Weight one is the reconstruction, weight zero its `zero detail`, and one channel's weight moves that channel."""
    vae = pair.upgraded.vae
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(images).latent_dist.mode()
    known = reconstructions(vae, pair.base.vae)
    for weight, name in ((1.0, "full"), (0.0, "zero detail")):
        faded = decode_faded(vae, latents, torch.full((8,), weight))
        assert torch.allclose(faded, known[name](images), atol=1e-5)
    one = reconstructing.weights_of(8, 0.5, 3, 3)
    assert one.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]
    raw = vae.denormalise(latents)
    z, z_d = vae.layout.split(raw)
    expected = vae.decode(vae.normalise(vae.layout.join(z, z_d * one.view(1, -1, 1, 1)))).sample
    assert torch.allclose(decode_faded(vae, latents, one), expected, atol=1e-6)


def test_a_photo_is_encoded_at_the_models_size(pair: Pair):
    photo = picture(1, width=50, height=40)
    encoded = reconstructing.encode(pair, photo)
    assert encoded.original.size == encoded.base.size == (32, 32)  # type: ignore[union-attr]
    full = reconstructing.decode_weighted(pair, encoded, torch.ones(8))
    assert full.size == (32, 32)
    assert reconstructing.encode(pair, picture(1, 80, 70), 64).original.size == (64, 64)
    with pytest.raises(DataError, match="smaller than the target"):
        reconstructing.encode(pair, picture(1, 20, 20))


def test_error_map_and_psnr_of_known_pictures():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert reconstructing.psnr_of(black, grey) == pytest.approx(-20 * np.log10(0.2))
    assert np.asarray(reconstructing.error_map(black, black)).max() <= 4  # the dark end of the colours
    bright = np.asarray(reconstructing.error_map(black, Image.new("RGB", (4, 4), "white")))
    assert bright.min() > 150


def test_the_place_that_differs_most_is_found_and_cut():
    first = Image.new("RGB", (64, 48), "white")
    second = first.copy()
    second.paste((0, 0, 0), (40, 8, 48, 16))
    x, y = drawing.most_different_place(first, second, 8)
    assert (x * 64 - 4, y * 48 - 4) == (40, 8)
    assert np.asarray(drawing.cut_place(second, x, y, 8)).max() == 0
    assert drawing.cut_place(second, 0.0, 1.0, 4).size == (64, 64)  # clipped at the edges


def test_pairs_without_a_base_or_without_an_upgrade(pair: Pair, tiny_base: Path, tmp_path: Path):
    assert pair.base is not None
    assert (pair.resolution, pair.scale) == (32, 2)
    alone = open_pair(str(Path(pair.name) / "pipeline"))
    assert alone.base is None
    assert drawing.ways_of(alone) == ["upgraded"]
    named = open_pair(str(Path(pair.name) / "pipeline"), str(tiny_base))
    assert drawing.ways_of(named) == list(drawing.WAYS)
    base = open_pair(str(tiny_base))
    assert drawing.ways_of(base) == ["base, enlarged", "base, native"]
    with pytest.raises(ModelError, match="is a base model"):
        reconstructing.encode(base, picture(0))
    with pytest.raises(ModelError, match="latent channels"):
        open_pair(str(Path(pair.name) / "pipeline"), "micro")


def test_inspection_gives_tokens_and_bound():
    rows, line = inspection("micro", 128, 2)
    assert "64 tokens instead of 256" in line
    assert any("tokens" in name for name, _ in rows)
    for arguments in (("micro", 130, 2), ("no-such-model", 128, 2)):
        with pytest.raises(ModelError):
            inspection(*arguments)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def test_a_training_starts_pauses_and_resumes(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.yaml"
    changes = {"stage1__max_steps": 20_000, "run__checkpoint_every": 10}
    recipe.write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, picture_folder, **changes)))
    trainings = Trainings(tmp_path / "runs")
    uploads = sorted(picture_folder.iterdir())
    try:
        trainings.start("first", str(recipe), uploads=uploads)
        saved = yaml.safe_load((tmp_path / "runs/first/recipe.yaml").read_text())
        assert saved["data"]["source"] == str(tmp_path / "runs/first/pictures")
        with pytest.raises(RunError, match="'first' runs"):
            trainings.start("second", str(recipe))
        wait_for(lambda: newest_images_of(tmp_path / "runs/first") is not None, "a first checkpoint")
        assert trainings.state("first").line.startswith("running: stage 1, detail VAE: step")
        trainings.pause("first")
        wait_for(lambda: not trainings.running("first"), "the pause")
        state = trainings.state("first")
        assert state.line.startswith("paused: stage 1, detail VAE: step")
        assert not state.finished
        assert {row["curve"] for row in trainings.curves("first")["stage1"]} == {"L1", "alignment"}
        newest = newest_images_of(tmp_path / "runs/first")
        assert newest is not None
        shown = checkpoint_images(tmp_path / "runs/first", newest)
        assert shown[0][0].size == (32, 32)
        assert shown[1][1] == f"stage 1, step {trainings.curves('first')['stage1'][-1]['step']}"
        with pytest.raises(RunError, match="resume it"):
            trainings.start("first", str(recipe))
        trainings.resume("first")
        assert trainings.running("first")
    finally:
        trainings.close()
    assert trainings.names() == ["first"]


def test_trainings_refuse_what_they_cannot_do(tmp_path: Path):
    trainings = Trainings(tmp_path)
    for name in ("../x", "", "A", "x" * 41):
        with pytest.raises(RunError, match="is not a name for a training"):
            trainings.start(name, "micro")
    with pytest.raises(RecipeError, match="did you mean 'micro'"):
        trainings.start("x", "micr")
    with pytest.raises(RecipeError, match="upgrades nothing"):
        trainings.start("x", "micro-base")
    with pytest.raises(RecipeError, match="the page trains up to"):
        trainings.start("x", "micro", overrides=["stage1.max_steps=1000000"])
    with pytest.raises(RunError, match="does not run"):
        trainings.pause("x")
    with pytest.raises(RunError, match="start it first"):
        trainings.resume("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "QwenImageTransformer2DModel"])
def test_other_families_open_with_their_base_and_draw(name: str, tmp_path: Path):
    """A U-Net in place of a transformer; an autoencoder that calls its channels otherwise."""
    folder = tmp_path / "base"
    BUILDERS[name](folder)
    base = load_pipeline(str(folder))
    vae = DetailVAE.from_base(base.vae, 8)
    vae.set_detail_statistics(torch.zeros(8), torch.ones(8))
    vae.register_to_config(resolution=64)
    assemble(base, vae, expand_transformer(denoiser(base), 8)).save_pretrained(tmp_path / "upgraded")
    pair = open_pair(str(tmp_path / "upgraded"), str(folder))
    ways = [drawing.ENLARGED, drawing.UPGRADED]
    options = {"seed": 0, "steps": 2, "guidance": 2.0, "stop": threading.Event()}
    drawn = list(drawing.draw(pair, "a red square", ways, **options))
    assert [d.way for d in drawn] == ways
    assert {d.image.width for d in drawn} == {pair.resolution}
