"""`davae data` and the summary at the start of a run: exact counts, poor captions, shown images, sizes kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, tiny_upgrade_recipe
from PIL import Image
from test_training import run_cli

from davae.data.conditions import check_captions
from davae.data.sizes import keep_sizes, load_sizes, measure_sizes
from davae.data.summary import (
    TokenLimit,
    count_words,
    read_captions,
    size_facts,
)
from davae.dataset import opened as opened_module
from davae.dataset.look import check_show, glimpse, look_at, recipe_step
from davae.dataset.opened import announce, bucket_notes, open_pictures
from davae.errors import DataError, ModelError, RecipeError, RunError
from davae.recipes import load_data, load_recipe, validate
from davae.recipes.sections import Data, Optim
from davae.runs.report import run_with_report
from davae.runs.upgrade import Upgrade

KEYS = {
    *("layout", "images", "captions", "captions_distinct", "captions_empty"),
    *("captions_cut", "classes", "left_out", "duplicates", "examples"),
}


class Texts:
    """A source of captions alone."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        return self.texts[index]

    def key(self, index: int) -> str:
        return f"{index}.png"


def folder_of(path: Path, captions: dict[str, str], size: tuple[int, int] = (12, 10)) -> Path:
    """Images by name, each with its caption unless that is empty."""
    for number, (name, caption) in enumerate(captions.items()):
        target = path / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(number, *size).save(target)
        if caption:
            target.with_suffix(".txt").write_text(caption)
    return path


# -- counts ----------------------------------------------------------------------------------------------------------


def test_captions_are_counted_by_every_text_encoder() -> None:
    texts = ["a", "a", "", "  ", "b " * 30, "c" * 30, "d " * 80]
    short = TokenLimit("text_encoder", 20, lambda captions: [len(c.split()) + 2 for c in captions])
    long = TokenLimit("text_encoder_3", 64, lambda captions: [len(c.split()) + 1 for c in captions])
    facts = read_captions(Texts(texts), range(7), [short, long])  # type: ignore[arg-type]
    assert (facts.present, facts.empty, facts.distinct, facts.cut) == (5, 2, 4, 2)
    assert {name: entry["captions"] for name, entry in facts.cut_by.items()} == {
        "text_encoder": 2,
        "text_encoder_3": 1,
    }
    assert (facts.commonest, facts.commonest_count) == ("a", 2)
    assert (facts.longest, facts.longest_name) == (159, "6.png")


def test_a_tokenizer_is_asked_only_about_captions_that_may_be_too_long() -> None:
    asked: list[str] = []

    def count(captions: list[str]) -> list[int]:
        asked.extend(captions)
        return [99] * len(captions)

    read_captions(Texts(["short"] * 1000 + ["é" * 40]), range(1001), [TokenLimit("t", 77, count)])  # type: ignore[arg-type]
    assert asked == ["é" * 40], "80 bytes may be 80 tokens"


def test_words_are_never_more_than_clips_tokens() -> None:
    from davae.pretrained.text_encoders import token_limits
    from davae.zoo import resolve

    name, tokens, count = token_limits(resolve("micro"), {})[0]
    texts = ["a red rose", "don't stop, 12 roses!!", "naïve café_au lait", "", "a " * 60]
    assert (name, tokens) == ("text_encoder", 20)
    assert count is not None
    assert all(words <= found for words, found in zip(count_words(texts), count(texts), strict=True))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""] * 6 + ["a"] * 4, "6 of 10 images have no caption"),
        (["same"] * 6 + list("abcd"), "6 of 10 captions are the same, 'same'"),
        ([""] * 5 + list("abcde"), None),
        (["one", "two"] * 5, None),
        (["only"], None),
    ],
)
def test_poor_captions_stop_a_run(tmp_path: Path, texts: list[str], message: str | None) -> None:
    source = folder_of(tmp_path, {f"{n:02d}": text for n, text in enumerate(texts)})
    summary = open_pictures(Data(source=str(source)), 8).summary()
    if message is None:
        check_captions(summary)
        return
    with pytest.raises(DataError, match=message) as raised:
        check_captions(summary)
    for way in ("data.caption_key", "data.caption_column", "data.require_captions=false", ".txt"):
        assert way in str(raised.value)


def test_the_line_and_the_contract(tmp_path: Path) -> None:
    captions = {"cat/0": "one", "cat/1": "word " * 90, "dog/2": "one", "dog/3": "three", "dog/4": "four"}
    folder = folder_of(tmp_path / "set", captions)
    picture(9, 4, 4).save(folder / "cat" / "small.png")
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    summary = look_at(Data(source=str(folder)), 8)
    assert summary.line() == "5 images, 5 captions (4 distinct, 1 cut at 77 tokens), 0 without"
    values = summary.as_dict()
    assert set(values) >= KEYS
    assert json.loads(json.dumps(values)) == values
    assert values["images"] == 5
    assert values["images_found"] == 7
    assert values["classes"] == {"cat": 2, "dog": 3}
    assert values["left_out"] == {"too small": 1, "empty file": 1}
    assert values["sizes"] == {"smallest": [12, 10], "median": [12, 10], "largest": [12, 10]}
    first = values["examples"][0]
    assert (first["name"], first["caption"], first["class"], first["width"], first["height"], first["file"]) == (
        ("cat/0.png", "one", "cat", 12, 10, None)
    )
    assert look_at(Data(source=str(folder))).as_dict()["left_out"] == {"empty file": 1}, (
        "no resolution, none too small"
    )


def test_images_with_a_damaged_caption_or_class_are_left_out_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"0": "one", "1": "two", "2": "three", "3": "", "4": "five"})
    (folder / "1.cls").write_bytes(b"cat")
    (folder / "3.txt").unlink(missing_ok=True)
    (folder / "3.json").write_bytes(b'{"caption": "a')
    (folder / "4.json").write_bytes(b'{"caption": "a"}')
    (folder / "4.txt").unlink()
    (folder / "0.cls").write_bytes(b"7")
    values = look_at(Data(source=str(folder)), 8).as_dict()
    for resolution in (8, None):  # what is shown leaves out the same images
        shown = look_at(Data(source=str(folder)), resolution, show=9, out=tmp_path / f"shown{resolution}").as_dict()
        assert shown["left_out"] == values["left_out"]
        assert [entry["caption"] for entry in shown["examples"]] == ["one", "three", "a"]
    assert values["left_out"] == {"damaged caption": 1, "damaged class": 1}
    assert (values["images"], values["captions"], values["captions_empty"], values["classes"]) == (3, 3, 0, {"7": 1})
    assert [entry["caption"] for entry in values["examples"]] == ["one", "three", "a"]


def test_several_lines_and_control_characters_are_shown(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"a": "one\ntwo", "b": "one"})
    (folder / "c\n\x1b[31m.mp4").write_bytes(b"x")
    summary = look_at(Data(source=str(folder)))
    assert "1 captions have several lines; each is one caption" in summary.notes
    assert r"c\n\x1b[31m.mp4" in summary.table()
    assert len(summary.table().splitlines()) == len(summary.rows())


def test_a_very_large_set_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from davae.data import summary as module

    monkeypatch.setattr(module, "READ", 4)
    folder = folder_of(tmp_path, {f"{n:02d}": f"caption {n}" for n in range(9)})
    found = look_at(Data(source=str(folder)), 8)
    assert (found.images, found.read, found.captions.present) == (9, 4, 4)
    assert found.line().startswith("9 images, of 4 read: 4 captions")


def test_sizes_of_images() -> None:
    pixels = np.array([[4, 9], [10, 10], [2, 2], [3, 3]], np.int32)
    assert size_facts(pixels) == {"smallest": (2, 2), "median": (3, 3), "largest": (10, 10)}
    assert size_facts(pixels[:0]) == {}


# -- sizes are kept --------------------------------------------------------------------------------------------------


def test_the_second_start_reads_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "set", {f"{n}": "x" for n in range(3)})
    (folder / "empty.jpg").write_bytes(b"")
    run, data = tmp_path / "run", Data(source=str(folder), holdout=0.0)
    first = open_pictures(data, 8, folder=run)
    assert not run.exists(), "nothing is written before the run's folder is"
    first.keep(run)
    calls: list[int] = []
    monkeypatch.setattr(opened_module, "measure_sizes", lambda *given: calls.append(1) or measure_sizes(*given))
    second = open_pictures(data, 8, folder=run)
    assert (second.train, second.left_out) == (first.train, first.left_out)
    assert not calls
    open_pictures(data.model_copy(update={"max_pixels": 10**6}), 8, folder=run)
    assert len(calls) == 1, "another limit of pixels"
    picture(1, 30, 30).save(folder / "1.png")
    assert open_pictures(data, 8, folder=run).survey.pixels.max() == 30
    assert len(calls) == 2, "a file of another size in bytes"


def test_sizes_are_kept_before_other_processes_are_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that ends while the others wait does not measure again."""
    folder, run = folder_of(tmp_path / "set", {"0": "x"}), tmp_path / "run"
    run.mkdir()
    data = Data(source=str(folder), holdout=0.0)

    def killed(value: object, *, patient: bool = False) -> None:
        assert patient, "measuring may take longer than the time limit of collectives"
        raise KeyboardInterrupt

    monkeypatch.setattr(opened_module, "from_main", killed)
    with pytest.raises(KeyboardInterrupt):
        open_pictures(data, 8, folder=run)
    assert not list(run.iterdir()), "the folder of no run"
    (run / "recipe.yaml").touch()
    with pytest.raises(KeyboardInterrupt):
        open_pictures(data, 8, folder=run)
    assert len(list(run.glob("survey-*.npz"))) == 1
    monkeypatch.undo()
    monkeypatch.setattr(opened_module, "measure_sizes", lambda *given: pytest.fail("measured again"))
    open_pictures(data, 8, folder=run).keep(run)
    assert len(list(run.glob("survey-*.npz"))) == 1


def test_damaged_or_unwritable_sizes_cost_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "set", {"0": "x"})
    source = open_pictures(Data(source=str(folder)), 8).source
    found = measure_sizes(source, range(1))
    keep_sizes(tmp_path, "k", found)
    (tmp_path / "survey-k.npz").write_bytes(b"PK broken")
    assert load_sizes(tmp_path, "k", 1) is None
    assert "the sizes are measured again" in caplog.text
    (tmp_path / "file").write_text("")
    keep_sizes(tmp_path / "file", "k", found)
    assert "the next start measures the sizes again" in caplog.text


# -- shown images ----------------------------------------------------------------------------------------------------


def test_images_are_shown_as_training_sees_them(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    wide = Image.new("RGBA", (24, 8), (255, 0, 0, 0))
    wide.save(folder / "a.png")
    turned = Image.new("RGB", (8, 16), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.jpg", exif=exif, quality=95)
    picture(0, 64, 64).save(folder / "c.jpg")
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:500])
    picture(1, 8, 8).save(folder / "d.png")
    data = load_data(str(folder), ["data.background=green", "data.enlarge=true", "data.buckets.max_ratio=4"])
    found = look_at(data, 16, step=4, show=3, out=tmp_path / "shown").as_dict()
    names = sorted(path.name for path in (tmp_path / "shown").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "contact-sheet.png"]
    assert [entry["name"] for entry in found["examples"]] == ["a.png", "b.jpg", "d.png"]
    assert [(entry["width"], entry["height"]) for entry in found["examples"]] == [(24, 8), (16, 8), (8, 8)]
    assert found["left_out"] == {"truncated": 1}
    assert found["images"] == 3
    first, second, third = (Image.open(entry["file"]) for entry in found["examples"])
    assert (first.size, first.getpixel((3, 3))) == ((32, 8), (0, 128, 0)), "bucket of 4:1, on green"
    assert second.size in {(16, 16), (32, 8)}
    assert second.width >= second.height, "turned"
    assert third.size == (16, 16), "enlarged"
    again = look_at(data, 16, step=4, show=1, out=tmp_path / "shown")
    assert len(again.examples) == 1
    assert len(list((tmp_path / "shown").iterdir())) == 2, "those of the earlier look are gone"


def test_without_a_resolution_images_are_shown_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"0": "x"}, (13, 7))
    found = look_at(Data(source=str(folder)), show=1, out=tmp_path / "shown")
    assert np.array_equal(np.asarray(Image.open(found.examples[0]["file"])), np.asarray(Image.open(folder / "0.png")))


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"0": "x"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_text("precious")
    for out, message in ((tmp_path / "mine", "found other files"), (folder / "0.png", "found a file")):
        with pytest.raises(RunError, match=message):
            look_at(Data(source=str(folder)), 8, show=1, out=out)
    assert (tmp_path / "mine" / "00000.png").read_text() == "precious"
    with pytest.raises(DataError, match="give --out DIR"):
        check_show(3, None)
    with pytest.raises(DataError, match="give --show N"):
        check_show(None, tmp_path)


# -- remote sources, options -----------------------------------------------------------------------------------------


def test_a_remote_set_is_not_read_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part, what = glimpse(Data(source="memory://set/s-{000..099}.tar"))
    assert part.source == "memory://set/s-000.tar"
    assert what == "the first of 100 shards, memory://set/s-000.tar"
    part, what = glimpse(Data(source="somebody/photos"))
    assert (part.streaming, part.limit, what) == (True, 100, "the first 100 rows")
    for name in ("openmoji", str(tmp_path), f"{tmp_path}/*.parquet", "a.tar", "/nowhere", "x.npz"):
        assert glimpse(Data(source=name)) == (Data(source=name), ""), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["stage1.lr=1"], "--set stage1.lr: this verb takes options of data alone"),
        (["data.fli=true"], "data.fli: unknown key; did you mean 'flip'"),
        (["data.crop=left"], "data.crop: "),
        (["data.caption_key=a", "data.caption_weights={b: 1}"], "give caption_weights, or one caption_key"),
    ],
)
def test_options_that_cannot_be(given: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_data("somewhere", given)


def test_options_of_a_recipe_hold_unless_changed() -> None:
    start = Data(source="a", flip=True, background="black")
    assert load_data("b", ["data.background=red"], start) == Data(source="b", flip=True, background="red")


# -- verbs -----------------------------------------------------------------------------------------------------------


def test_davae_data_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "set", {"0": "one", "1": ""})
    file, shown = tmp_path / "data.json", tmp_path / "shown"
    run_cli("data", str(folder), "--resolution", "8", "--json", str(file), "--show", "2", "--out", str(shown))
    out = capsys.readouterr().out
    assert "2 images, 1 captions" in " ".join(out.split())
    values = json.loads(file.read_text())
    assert (values["images"], values["captions"], values["captions_empty"]) == (2, 1, 1)
    assert all(Path(entry["file"]).is_file() for entry in values["examples"])


@pytest.mark.parametrize("fault", ["damaged", "too small"])
def test_davae_data_of_no_usable_image_fails_after_its_summary(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = folder_of(tmp_path / "set", {"0": "one", "1": "two"}), tmp_path / "data.json"
    if fault == "damaged":
        for image in folder.glob("*.png"):
            image.write_bytes(b"no image")
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("data", str(folder), "--resolution", "64", "--json", str(file))
    shown = capsys.readouterr()
    assert "left out" in shown.out
    assert shown.err.endswith("none of 2 images can be used; mend what is left out above\n")
    assert json.loads(file.read_text())["images"] == 0


def test_davae_data_of_a_recipe_does_without_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("davae.pretrained.open.hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = folder_of(tmp_path / "set", {"0": "word " * 90, "1": ""})
    tiny = ("--resolution", "8")
    (tmp_path / "own.yaml").write_text(
        "{name: own, base: {model: some/gated-model, resolution: 8}, detail_channels: 16, "
        "stage1: {max_steps: 1, batch_size: 1}, stage2: {max_steps: 1, batch_size: 1}}"
    )
    own = ("--recipe", str(tmp_path / "own.yaml"))
    run_cli("data", str(folder), *own, *tiny)
    shown, log = (" ".join(text.split()) for text in capsys.readouterr())
    assert "2 images, 1 captions (1 distinct, 1 cut at 77 tokens)" in shown
    assert "captions are counted by their words, at least: model 'some/gated-model'" in log
    for name in ("imagenet512-lightningdit-xl", "sdxl-2k"):  # of a folder to be made, and of a preset
        run_cli("data", str(folder), "--recipe", name, *tiny)
    buckets = load_recipe("sd35-medium-1k", ["data.buckets.max_ratio=2"])
    assert recipe_step(buckets) == 32  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"some/gated-model' is not a folder here"):
        recipe_step(load_recipe(own[1]))  # type: ignore[arg-type]


def test_a_run_writes_its_summary_and_stops_at_poor_captions(tiny_base: Path, tmp_path: Path) -> None:
    poor = folder_of(tmp_path / "poor", {f"{n}": "" for n in range(6)}, (40, 40))
    values = tiny_upgrade_recipe(tiny_base, poor)
    out = tmp_path / "run"
    run = Upgrade(validate(values, "tiny"), out, lambda progress: None)  # type: ignore[arg-type]
    assert json.loads((out / "data.json").read_text())["captions_empty"] == 6
    assert list(out.glob("survey-*.npz"))
    with pytest.raises(DataError, match="6 of 6 images have no caption"):
        run_with_report(run, lambda progress: None)
    good = folder_of(tmp_path / "good", {f"{n}": f"a {n}" for n in range(6)}, (40, 40))
    values["data"]["source"] = str(good)
    run = Upgrade(validate(values, "tiny"), out, lambda progress: None)  # type: ignore[arg-type]
    run.check_data()  # the same folder takes the corrected recipe
    run.folder.close()
    values["data"] = {"source": str(poor), "require_captions": False}
    run = Upgrade(validate(values, "tiny"), tmp_path / "other", lambda progress: None)  # type: ignore[arg-type]
    run.check_data()
    run.folder.close()


def test_stages_of_two_sources(tiny_base: Path, tmp_path: Path) -> None:
    first = folder_of(tmp_path / "sam", {f"s{n}": "" for n in range(8)}, (40, 40))
    second = folder_of(tmp_path / "made", {f"m{n}": f"prompt {n}" for n in range(5)}, (40, 40))
    values = tiny_upgrade_recipe(tiny_base, first, stage2__data={"source": str(second)})
    recipe = validate(values, "tiny")
    out = tmp_path / "run"
    run = Upgrade(recipe, out, lambda progress: None)  # type: ignore[arg-type]
    run.check_data()
    assert {run.data.stage1.source.key(i)[0] for i in run.data.for_stage1().indices} == {"s"}
    assert {run.opened.source.key(i)[0] for i in run.data.for_cache().indices} == {"m"}
    assert json.loads((out / "data.json").read_text())["source"] == str(second)
    assert json.loads((out / "stage1-data.json").read_text())["source"] == str(first)
    vae = run.new_vae()
    key = run.cache_key(vae)
    run.folder.close()
    # the cache's key follows stage 2's images, not stage 1's
    other = tiny_upgrade_recipe(tiny_base, second, stage1__data={"source": str(first)})
    same = Upgrade(validate(other, "tiny"), tmp_path / "same", lambda progress: None)  # type: ignore[arg-type]
    assert same.cache_key(vae) == key
    same.folder.close()
    alone = Upgrade(
        validate(tiny_upgrade_recipe(tiny_base, first), "tiny"),  # type: ignore[arg-type]
        tmp_path / "alone",
        lambda progress: None,
    )
    assert alone.cache_key(vae)["data"] != key["data"]
    alone.folder.close()


def test_two_sources_in_recipes() -> None:
    recipe = load_recipe("sd35-medium-1k", ["stage1.data.source=sam.tar", "stage2.data.flip=true"])
    assert recipe.stage1_data == Data(source="sam.tar")  # type: ignore[union-attr]
    assert recipe.stage2_data == Data(flip=True)  # type: ignore[union-attr]
    plain = load_recipe("sd35-medium-1k")
    assert plain.stage1_data is plain.stage2_data is plain.data  # type: ignore[union-attr]


def test_small_buckets_are_named(tmp_path: Path) -> None:
    for number in range(60):
        picture(number, 32 if number < 57 else 64, 32 if number < 57 else 16).save(tmp_path / f"{number:02d}.png")
    opened = open_pictures(load_data(str(tmp_path), ["data.buckets.max_ratio=4", "data.holdout=0"]), 32, 4)
    few, many = (bucket_notes(opened, "stage1", Optim(max_steps=steps, batch_size=8)) for steps in (10, 60))
    assert few == [
        "stage1: bucket 64x16 holds 3 items, fewer than a batch of 8: none of the 10 batches is of it; raise "
        "stage1.max_steps or lower data.buckets.max_ratio"
    ]
    assert many == [
        "stage1: bucket 64x16 holds 3 items, fewer than a batch of 8: 3 of 60 batches are of it, its images repeated "
        "within each"
    ]


def test_a_summary_is_logged_once_and_rewritten_only_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "set", {"0": "one"})
    file = tmp_path / "data.json"
    with caplog.at_level(logging.INFO):
        announce(look_at(Data(source=str(folder)), 8), file)
    assert caplog.text.count("1 images, 1 captions (1 distinct), 0 without") == 1
    before = file.stat().st_mtime_ns
    announce(look_at(Data(source=str(folder)), 8), file)
    assert file.stat().st_mtime_ns == before
    picture(5, 12, 12).save(folder / "1.png")
    announce(look_at(Data(source=str(folder)), 8), file)
    assert json.loads(file.read_text())["images"] == 2


# -- a download folder as people have it -----------------------------------------------------------------------------


def messy(folder: Path) -> Path:
    """Twenty faults in one folder."""
    folder.mkdir()

    def put(name: str, seed: int, text: bytes | None = None, size: tuple[int, int] = (20, 20)) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, *size).save(target)
        if text is not None:
            target.with_suffix(".txt").write_bytes(text)

    put("a.jpg", 1, b"a red square")
    put("b.jpg", 2, b"\xef\xbb\xbfa blue square")  # a byte order mark
    put("c.jpg", 3, "ein grünes Bild".encode("utf-16"))
    put("d.jpg", 4, "café".encode("cp1252"))
    put("e.png", 5, b"a red square")  # the same caption again
    put("f.png", 6, b"")
    put("g.png", 7)  # no caption
    put("h.webp", 8, b"word " * 90)  # too long for CLIP
    put("2.image.png", 9)
    (folder / "2.caption.txt").write_text("a paired caption")
    picture(10, 20, 20).save(folder / "i.jfif", "JPEG")
    (folder / "i.TXT").write_text("upper case")
    put("small.png", 11, b"small", (4, 4))
    put(".ipynb_checkpoints/a.jpg", 12)
    for name, data in {"empty.jpg": b"", "page.jpg": b"<html>", "._a.jpg": b"\0\5\x16\7", "film.mp4": b"x",
                       "art.psd": b"8BPS", "notes.pdf": b"%PDF", "Thumbs.db": b"x"}.items():  # fmt: skip
        (folder / name).write_bytes(data)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return folder


def test_a_messy_download_folder(tmp_path: Path) -> None:
    found = look_at(Data(source=str(messy(tmp_path / "messy"))), 16)
    values = found.as_dict()
    assert found.line() == "10 images, 8 captions (7 distinct, 1 cut at 77 tokens), 2 without"
    expected = {
        "images": 10,
        "images_found": 14,
        "captions": 8,
        "captions_distinct": 7,
        "captions_empty": 2,
        "captions_cut": 1,
        "captions_from": ".txt",
        "classes": {},
        "left_out": {"empty file": 1, "missing file": 1, "not an image": 1, "too small": 1},
        "duplicates": 0,
        "encodings_first": {"cp1252": ["d.txt"]},
        "unused": {
            "hidden file": 2,
            "hidden or thumbnail folder": 1,
            ".psd (not an image that davae reads)": 1,
            ".mp4": 1,
            ".pdf": 1,
        },
    }
    assert {name: values[name] for name in expected} == expected
    assert {entry["name"]: entry["caption"] for entry in values["examples"]} == {
        "a.jpg": "a red square",
        "b.jpg": "a blue square",
        "c.jpg": "ein grünes Bild",
        "d.jpg": "café",
        "e.png": "a red square",
        "f.png": "",
        "g.png": "",
        "h.webp": ("word " * 90).strip(),
        "2.image.png": "a paired caption",
        "i.jfif": "upper case",
    }
