"""Which images a run takes and how: spread over the set, both orientations, enlarged, in proportion, told once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from davae.data.batches import Batches
from davae.data.buckets import nearest_bucket
from davae.data.equal_files import equal_images
from davae.data.images import ImageDataset, adm_crop, collate, held_out, split, spread_indices
from davae.data.latent_cache.meta import seal
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.write import write_latents, write_text
from davae.data.sources import open_source
from davae.data.summary import EQUAL
from davae.data.survey import survey
from davae.dataset.opened import open_images, open_pictures
from davae.errors import DataError, RecipeError
from davae.evaluate.generation import batches, real_pictures
from davae.recipes import load_recipe
from davae.recipes.sections import Data

# -- a part of a set -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images in ten class folders."""
    folder = tmp_path_factory.mktemp("ten")
    for number in range(100):
        target = folder / f"class {number // 10}" / f"{number:03d}.png"
        target.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, number, number)).save(target)
    return folder


def test_a_part_is_spread_over_the_set_and_part_of_a_larger_part() -> None:
    assert list(spread_indices(5, None)) == list(spread_indices(5, 9)) == [0, 1, 2, 3, 4]
    few, many = spread_indices(100, 20), spread_indices(100, 40)
    assert list(few) == sorted(set(few))
    assert set(few) < set(many)
    assert len({place // 10 for place in few}) >= 8
    assert list(spread_indices(100, 20)) == list(few), "no process draws another part"


def test_limit_and_num_cover_the_classes(ten_classes: Path) -> None:
    opened = open_pictures(Data(source=str(ten_classes), limit=20, holdout=0.0), 8)
    assert len(opened.train) == 20
    assert len({opened.source.label(i) for i in opened.train}) >= 8
    pictures = real_pictures(str(ten_classes), 8, 0.0, "train")
    grey = torch.cat(list(batches(pictures, 20)))[:, 0, 0, 0]  # (20,)
    assert len({int((value + 1) * 127.5 + 0.5) // 10 for value in grey.tolist()}) >= 8
    assert len(opened.shown(7)) == 7
    assert len({opened.source.label(i) for i in opened.shown(7)}) >= 5


def test_a_split_of_a_part_keeps_each_name_on_its_side(ten_classes: Path) -> None:
    source = open_source(str(ten_classes), 8)
    whole, part = split(source, 0.3), split(source, 0.3, spread_indices(100, 30))
    assert set(part.held_out) == set(whole.held_out) & set(spread_indices(100, 30))
    assert set(part.train) == set(whole.train) & set(spread_indices(100, 30))


# -- flips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variants", "mirrored"), [(1, [0]), (2, [0, 1]), (3, [0, 0, 1]), (4, [0, 0, 1, 1])])
def test_variants_enumerate_flips(tmp_path: Path, variants: int, mirrored: list[int]) -> None:
    """Every image in every variant: dark on the left is an image as it is, dark on the right a mirrored one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        image = Image.new("L", (8, 8), 10 * number)
        image.paste(255, (4, 0, 8, 8))
        image.convert("RGB").save(folder / f"{number}.png")
    pictures = ImageDataset(open_source(str(folder), 8), range(6), 8, flip=True)
    key: dict[str, Any] = {"autoencoder": "a", "data": "d"}
    options: dict[str, Any] = {"batch_size": 2, "dtype": "float32"}
    meta = write_latents(tmp_path / "cache", pictures, lambda images: images, key=key, variants=variants, **options)
    seal(
        tmp_path / "cache",
        write_text(tmp_path / "cache", lambda texts: (torch.zeros(len(texts), 1),), meta, **options),
    )
    cache = CachedLatents(tmp_path / "cache")
    found: dict[int, list[int]] = {}
    for place in range(len(cache)):
        row = cache[(place, 0)][0][0, 0]  # (8,)
        flipped = int(row[0] > row[-1])
        found.setdefault(round(float(min(row)) * 127.5 + 127.5), []).append(flipped)
    assert {level: sorted(sides) for level, sides in found.items()} == {10 * n: mirrored for n in range(6)}


def test_training_still_draws_its_flips(tmp_path: Path) -> None:
    picture(0, 8, 8).save(tmp_path / "a.png")
    pictures = ImageDataset(open_source(str(tmp_path), 8), [0], 8, flip=True)
    seen = {pictures.read(0, draw)["image"].numpy().tobytes() for draw in range(20)}
    assert len(seen) == 2
    cached = pictures.enumerating()
    assert [cached.read(0, draw)["image"].numpy().tobytes() for draw in (0, 2, 4)] == [
        pictures.read(0, -1)["image"].numpy().tobytes()
    ] * 3


# -- ADM's preparation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (64, 97), (16, 16), (300, 31), (1, 9), (129, 128), (32, 40)])
def test_adm_crop_is_adms(size: tuple[int, int]) -> None:
    """Against the arithmetic of guided-diffusion's `center_crop_arr`, written out on arrays for a target of 16."""
    image = picture(3, *size)
    side, expected = 16, image
    while min(expected.size) >= 32:
        expected = expected.resize(tuple(length // 2 for length in expected.size), Image.Resampling.BOX)  # type: ignore[arg-type]
    scale = side / min(expected.size)
    pixels = np.asarray(
        expected.resize(tuple(round(length * scale) for length in expected.size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    )
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    assert np.array_equal(np.asarray(adm_crop(image, side, side)), pixels[top : top + side, left : left + side])


@pytest.mark.parametrize("target", [(24, 8), (8, 24), (33, 17)])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.99, 0.3)])
def test_adm_crop_fills_any_bucket(target: tuple[int, int], place: tuple[float, float]) -> None:
    for size in ((5, 5), (200, 20), (20, 200), (24, 8)):
        assert adm_crop(Image.new("RGB", size, "red"), *target, place).getcolors() == [
            (target[0] * target[1], (255, 0, 0))
        ]


def test_small_images_train_when_enlarged(tmp_path: Path) -> None:
    for number, size in enumerate([(500, 375), (20, 20), (600, 600)]):
        picture(number, *size).save(tmp_path / f"{number}.png")
    plain = Data(source=str(tmp_path), holdout=0.0)
    assert open_pictures(plain, 512).train == [2]
    opened = open_pictures(plain.model_copy(update={"enlarge": True}), 512)
    assert (opened.train, opened.left_out) == ([0, 1, 2], {})
    image = opened.pictures(plain.model_copy(update={"enlarge": True}), 0)[(0, -1)]["image"]
    expected = np.asarray(adm_crop(picture(0, 500, 375), 512, 512))
    assert np.array_equal(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), expected)
    assert nearest_bucket([(96, 96), (64, 144), (144, 64)], 10, 20, enlarge=True) == 1
    with pytest.raises(DataError, match=r"never enlarges training data unless data\.enlarge is set"):
        survey(open_source(str(tmp_path), 8), [1], [(512, 512)])


def test_the_imagenet_recipes_enlarge_and_no_other() -> None:
    from davae.recipes import shipped_recipes

    on = {name for name in shipped_recipes() if load_recipe(name).data.enlarge}
    assert on == {name for name in shipped_recipes() if name.startswith("imagenet512")}


# -- buckets and what travels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_batches_of_small_buckets_are_foretold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.choice(3, 60, p=[0.9, 0.06, 0.04]).astype(np.int16)
    for steps in (1, 7, 8, 40, 100):
        order = Batches(60, 8, seed=seed, start=0, stop=steps, groups=groups)
        taken = [int(groups[batch[0][0]]) for batch in order]
        assert order.of_buckets() == {group: taken.count(group) for group in np.unique(groups).tolist()}


def test_a_bucket_smaller_than_a_batch_is_drawn_once_its_images_have_gathered() -> None:
    """Three wide images among 60 at batch 8: nothing in two epochs, one batch in the third."""
    groups = np.array([0] * 57 + [1] * 3, np.int16)
    order = list(Batches(60, 8, seed=0, start=0, stop=60, groups=groups))
    wide = [number for number, batch in enumerate(order) if groups[batch[0][0]] == 1]
    assert min(wide) >= 14
    assert len(wide) == 3, "in proportion: 3 of 60 images in 8 epochs"
    assert {position for position, _ in order[wide[0]]} == {57, 58, 59}


def test_only_new_names_travel(tmp_path: Path) -> None:
    for number in range(4):
        picture(number, 8, 8).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"broken")
    pictures = ImageDataset(open_source(str(tmp_path), 8), range(5), 8)
    pictures.skipped |= {f"old {number}": "too small" for number in range(100_000)}
    items = [pictures[(place, 0)] for place in (0, 4, 4, 1)]
    assert [len(item["skipped"]) for item in items] == [0, 1, 0, 0]
    assert list(collate(items)["skipped"]) == ["5.png"]
    assert "5.png" in pictures.skipped


@pytest.mark.parametrize(
    ("given", "source"),
    [
        (["data.source=2024"], "2024"),
        (["data.source=2024-05-01"], "2024-05-01"),
        (['data.source="1e5"'], "1e5"),
        (['data.source="nan"'], "nan"),
        (["data.source=photos"], "photos"),
    ],
)
def test_a_source_may_look_like_a_number(given: list[str], source: str) -> None:
    assert load_recipe("micro", given).data.source == source


def test_a_source_that_yaml_reads_as_a_truth_value() -> None:
    with pytest.raises(RecipeError, match=r"data\.source: YAML reads it as true; put the name into quotes"):
        load_recipe("micro", ["data.source=yes"])


# -- equal files ---------------------------------------------------------------------------------------------------------


def shades(folder: Path, values: dict[str, int], size: int = 0) -> Path:
    """Write images, equal ones for equal values, padded to `size` bytes."""
    folder.mkdir()
    for name, value in values.items():
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (value, 0, 0)).save(buffer, "PNG")
        (folder / name).write_bytes(buffer.getvalue().ljust(size, b"\0"))
    return folder


@pytest.mark.parametrize("form", ["folder", "shard"])
@pytest.mark.parametrize("size", [0, 20_000, 70_000])
def test_equal_files_are_counted(tmp_path: Path, form: str, size: int) -> None:
    folder = shades(tmp_path / "set", {"a.png": 1, "b.png": 2, "c.png": 1, "d.png": 1, "e.png": 3}, size)
    with (folder / "e.png").open("r+b") as stream:  # differs from nothing else in size
        stream.seek(0, io.SEEK_END)
        stream.write(b"\0")
    (folder / "empty.png").write_bytes(b"")
    (folder / "void.png").write_bytes(b"")
    where, prefix = str(folder), ""
    if form == "shard":
        where, prefix = str(tmp_path / "a.tar"), "a.tar/"
        with tarfile.open(where, "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
    opened = open_pictures(Data(source=where, holdout=0.0), 8)
    values = opened.summary().as_dict()
    end = ".png" if form == "folder" else ""
    assert (values["duplicates"], list(values["duplicates_by_kind"].values())) == (2, [2])
    assert opened.summary().duplicates[EQUAL].names == [f"{prefix}{n}{end} = {prefix}a{end}" for n in "cd"]
    assert values["images"] == 5
    opened.keep(tmp_path / "run")
    again = open_pictures(Data(source=where, holdout=0.0), 8, folder=tmp_path / "run")
    assert again.equal == opened.equal
    assert len(again.equal) == 2


def test_files_that_differ_between_the_samples_are_not_equal(tmp_path: Path) -> None:
    folder = shades(tmp_path / "set", {"a.png": 1, "b.png": 1}, 40_000)
    with (folder / "b.png").open("r+b") as stream:
        stream.seek(10_000)
        stream.write(b"x")
    assert not open_pictures(Data(source=str(folder)), 8).equal


def test_only_files_of_equal_size_are_read_and_whole_ones_where_their_samples_agree(tmp_path: Path) -> None:
    read: list[tuple[int, int]] = []

    class Files:
        content = (b"a" * 90_000, b"a" * 90_001, b"a" * 45_000 + b"b" * 45_000, b"a" * 90_000)

        def length(self, index: int) -> int:
            return len(self.content[index])

        def parts(self, index: int, stretches: Any) -> Any:
            for offset, size in stretches:
                read.append((index, len(self.content[index][offset : offset + size])))
                yield self.content[index][offset : offset + size]

    assert equal_images(Files(), range(4)) == {3: 0}
    assert {index: sum(size for own, size in read if own == index) for index in range(4)} == {
        0: 3 * 4096 + 90_000,
        1: 0,
        2: 3 * 4096,
        3: 3 * 4096 + 90_000,
    }
    assert equal_images(Files(), range(4), {0}) == {}


def test_a_held_out_image_whose_equal_trains_is_not_measured(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(40)]
    held = [name for name in names if held_out(name, 0.3)]
    trains = next(name for name in names if name not in held)
    values = {name: number for number, name in enumerate(names)}
    folder = shades(tmp_path / "set", {**values, held[0]: values[trains], held[2]: values[held[1]]})
    data = Data(source=str(folder), holdout=0.3)
    opened = open_pictures(data, 8)
    keys = {opened.source.key(index) for index in opened.held_out}
    assert keys == set(held) - {held[0]}
    assert {opened.source.key(index) for index in opened.train} == set(names) - set(held)
    assert "1 held-out images are equal to training images" in opened.summary().table()
    side = open_images(data, 8, side="held_out")
    assert {side.source.key(index) for index in side.survey.indices} == keys
