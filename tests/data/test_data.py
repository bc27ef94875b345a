"""Pictures as people have them, the order of training, caches and their statistics."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from davae.data.batches import Batches
from davae.data.images import ImageDataset, held_out, split
from davae.data.latent_cache.meta import read_meta, seal
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.write import ChannelStatistics, write_latents, write_text
from davae.data.openmoji import Emoji, caption, colour_word
from davae.data.options import SourceOptions
from davae.data.shards.names import expand_shards
from davae.data.sources import open_source
from davae.data.survey import survey, usable
from davae.errors import DataError


def test_every_kind_of_picture_becomes_upright_srgb(tmp_path: Path):
    """Left half red, right half blue, 48x32, in every disguise."""
    plain = Image.new("RGB", (48, 32), (255, 0, 0))
    plain.paste((0, 0, 255), (24, 0, 48, 32))
    plain.save(tmp_path / "a.png")
    plain.save(tmp_path / "b.webp", lossless=True)
    plain.save(tmp_path / "c.jpg", quality=100, subsampling=0)
    plain.convert("CMYK").save(tmp_path / "d.jpg", quality=100, subsampling=0)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it a quarter clockwise
    turned.save(tmp_path / "e.png", exif=exif)
    plain.quantize().save(tmp_path / "f.png")
    source = open_source(str(tmp_path), 32)
    for index in range(len(source)):
        image, _ = source.load(index)
        assert (image.mode, image.size, source.size(index)) == ("RGB", (48, 32), (48, 32)), source.key(index)
        pixels = np.asarray(image, dtype=int)
        assert np.abs(pixels[16, 8] - (255, 0, 0)).max() < 12, source.key(index)
        assert np.abs(pixels[16, 40] - (0, 0, 255)).max() < 12, source.key(index)


def test_grey_alpha_and_16_bit(tmp_path: Path):
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "c.png")
    on_white = open_source(str(tmp_path), 8)
    on_green = open_source(str(tmp_path), 8, SourceOptions(background="lime"))
    assert on_white.load(0)[0].getpixel((4, 4)) == (100, 100, 100)
    assert on_white.load(1)[0].getpixel((4, 4)) == (255, 255, 255)
    assert on_green.load(1)[0].getpixel((4, 4)) == (0, 255, 0)
    assert abs(on_white.load(2)[0].getpixel((4, 4))[0] - 128) <= 1


def test_corrupt_and_truncated_pictures_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    buffer = io.BytesIO()
    picture(1, 64, 64).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:300])
    source = open_source(str(tmp_path), 32)
    pictures = ImageDataset(source, [0, 1, 2], 32)
    with caplog.at_level(logging.WARNING):
        items = [pictures[(i, -1)] for i in range(3)]
    assert [source.key(item["index"]) for item in items] == ["good.png"] * 3
    assert set(pictures.skipped) == {"text.jpg", "cut.jpg"}
    assert "skipped cut.jpg" in caplog.text
    (tmp_path / "good.png").unlink()
    broken = open_source(str(tmp_path), 32)
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        ImageDataset(broken, [0, 1], 32)[(0, 0)]


def test_small_pictures_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    picture(0, 40, 40).save(tmp_path / "big.png")
    picture(1, 40, 20).save(tmp_path / "low.png")
    source = open_source(str(tmp_path), 32)
    with caplog.at_level(logging.WARNING):
        assert [source.key(i) for i in usable(source, [0, 1], 32)] == ["big.png"]
    assert "left out low.png: too small: 40x20 is smaller than the target of 32 pixels" in caplog.text
    with pytest.raises(
        DataError, match="every image is smaller than the target of 64 pixels \\(the largest is 40x40\\)"
    ):
        usable(source, [0, 1], 64)


def test_many_small_pictures_are_one_line_and_a_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(30):
        picture(number, 16, 14).save(tmp_path / f"{number:02}.png")
    (tmp_path / "cut.png").write_bytes(b"")
    source = open_source(str(tmp_path), 32)
    survey(source, range(31), [(32, 32)], strict=False)
    small, cut, last = (record.getMessage() for record in caplog.records)
    assert small.endswith("smaller than the target of 32 pixels; the same of 01.png, 02.png and 27 more")
    assert cut == "left out cut.png: empty file"
    assert last.startswith("0 of 31 images can be used; 31 left out: 30 too small (")
    assert last.endswith("; most are too small: use larger images, a smaller resolution, or --set data.enlarge=true")


def test_a_source_of_a_similar_name_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)

    def unreached(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'photo' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", unreached)
    with pytest.raises(DataError, match=r"'photo' is not a file or folder here \(did you mean photos\?\), .* Hub$"):
        open_source("photo", 32)
    with pytest.raises(DataError, match=r"\./photo does not exist \(did you mean \./photos\?\)$"):
        open_source("./photo", 32)


def test_missing_sources(tmp_path: Path):
    with pytest.raises(DataError, match="holds no images"):
        open_source(str(tmp_path), 32)
    with pytest.raises(DataError, match="does not exist"):
        open_source("/no/such/folder", 32)
    with pytest.raises(DataError, match="no shard matches"):
        open_source(str(tmp_path / "a-*.tar"), 32)
    (tmp_path / "bad.tar").write_text("x" * 2000)
    with pytest.raises(DataError, match="not a whole tar"):
        open_source(str(tmp_path / "bad.tar"), 32)


def test_shards_with_captions_and_classes(tmp_path: Path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard:03d}.tar", "w") as archive:
            for number in range(2):
                buffer = io.BytesIO()
                picture(shard * 2 + number).save(buffer, "PNG")
                parts = {
                    "png": buffer.getvalue(),
                    "txt": f"text {shard}{number}".encode(),
                    "cls": str(number).encode(),
                }
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    pattern = str(tmp_path / "s-{000..001}.tar")
    assert expand_shards(pattern) == expand_shards(str(tmp_path / "s-*.tar"))
    source = open_source(pattern, 32)
    assert [source.load(i)[1] for i in range(4)] == ["text 00", "text 01", "text 10", "text 11"]
    assert [source.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert len({source.key(i) for i in range(4)}) == 4


def test_folders_are_classes_and_texts_are_captions(tmp_path: Path):
    for name in ("big_cat", "dog"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "x.png")
    (tmp_path / "dog" / "x.txt").write_text(" a small dog\n")
    source = open_source(str(tmp_path), 32)
    assert [(source.load(i)[1], source.label(i)) for i in range(2)] == [("big cat", 0), ("a small dog", 1)]


def test_real_photos(shared: Path):
    source = open_source(str(shared / "data" / "clothing128.tar"), 128)
    assert len(source) == 5096
    parts = split(source, 0.1)
    assert 400 < len(parts.held_out) < 620
    item = ImageDataset(source, parts.train, 64)[(3, 7)]
    assert item["image"].shape == (3, 64, 64)
    assert float(item["image"].std()) > 0.05


def test_hugging_face_dataset(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(i) for i in range(3)], "text": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000.parquet")
    from davae.data.tables import TableSource

    source = TableSource(str(tmp_path), SourceOptions())
    assert (len(source), source.load(1)[1], source.size(1)) == (3, "b", (40, 36))
    with pytest.raises(DataError, match="image_column 'photo' is not in"):
        TableSource(str(tmp_path), SourceOptions(image_column="photo"))


def test_split_depends_on_names_alone():
    keys = [f"picture {i}" for i in range(4000)]
    share = sum(held_out(key, 0.1) for key in keys) / len(keys)
    assert share == pytest.approx(0.1, abs=0.02)
    assert all(held_out(key, 0.5) for key in keys if held_out(key, 0.1))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_cover_each_epoch_once_whatever_the_ranks(ranks: int):
    length, batch = 30, 5
    draws = []
    for rank in range(ranks):
        order = Batches(length, batch, seed=3, start=0, stop=6 // ranks, rank=rank, ranks=ranks)
        draws += [item for part in order for item in part]
    assert sorted(draw for _, draw in draws) == list(range(30))
    assert sorted(position for position, _ in draws) == list(range(30))


def test_batches_resumed_equal_batches_uninterrupted():
    whole = list(Batches(7, 3, seed=1, start=0, stop=9))
    assert list(Batches(7, 3, seed=1, start=4, stop=9)) == whole[4:]


def test_statistics_equal_the_whole_in_float64():
    latents = torch.randn(37, 3, 4, 5) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 100
    statistics = ChannelStatistics(3)
    for part in latents.split(8):
        statistics.update(part)
    values = latents.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.mean, values.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.std, values.std(1, unbiased=False), rtol=1e-10, atol=0)


def test_cache_round_trip_and_stale_key(tmp_path: Path, picture_folder: Path):
    pictures = ImageDataset(open_source(str(picture_folder), 32), list(range(12)), 32)
    encode = lambda images: images[:, :, ::8, ::8]  # noqa: E731
    key = {"autoencoder": "a", "data": "d", "preprocessing": {"data.flip": False}}
    with pytest.raises(DataError, match="holds no whole latent cache"):
        read_meta(tmp_path)
    meta = write_latents(tmp_path, pictures, encode, key=key, variants=2, batch_size=5, dtype="float32")
    embed = lambda captions: (torch.tensor([[float(len(text))] for text in captions]),)  # noqa: E731
    seal(tmp_path, write_text(tmp_path, embed, meta, batch_size=2, dtype="float32"))
    cache = CachedLatents(tmp_path)
    assert len(cache) == 24
    latent, text = cache[(3, 0)]
    item = pictures[(3, 3)]
    assert np.array_equal(latent, encode(item["image"][None])[0].numpy())
    assert text == item["caption"]
    assert torch.equal(cache.embed(["a red square", "", "a blue square"])[0], torch.tensor([[12.0], [0.0], [13.0]]))
    with pytest.raises(DataError, match="has no caption 'x'"):
        cache.embed(["x"])
    assert read_meta(tmp_path, key).items == 24
    with pytest.raises(DataError, match="is stale: the autoencoder's weights or config and the images or their"):
        read_meta(tmp_path, {**key, "autoencoder": "b", "data": "e"})
    with pytest.raises(
        DataError, match=r"is stale: the preprocessing \(data.flip: False -> True\) changed; delete it"
    ):
        read_meta(tmp_path, {**key, "preprocessing": {"data.flip": True}})


def test_openmoji_captions():
    rose = Emoji("1F339", "rose", "red")
    assert caption(rose) == "a rose"
    assert caption(rose, "orange") == "a rose on an orange background"
    said = {caption(rose, "white", np.random.default_rng(i)) for i in range(50)}
    assert {"a red rose", "rose", "a rose"} <= said
    assert colour_word(0.9, 0.2, 0.2) == "red"
    assert colour_word(0.35, 0.2, 0.05) == "brown"
