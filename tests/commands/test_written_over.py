"""Nothing is written over without a word: samples and figures of another call keep their files."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from davae.analyze.curves import compared_runs_figure, curves_figure
from davae.analyze.figure import write_figure
from davae.commands.sample import image_size
from davae.errors import RecipeError, RunError
from davae.files.outputs import save_image
from davae.sample import image_folder as drawing
from davae.sample.open import SamplingOptions

OPTIONS = SamplingOptions(steps=2, guidance=2.5, seed=1, batch_size=4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of a pipeline that draws an image of a new colour each."""
    calls: list[dict[str, Any]] = []

    def generate(pipeline: Any, prompts: list[str], how: SamplingOptions, **options: Any) -> list[Image.Image]:
        calls.append({"how": how, **options})
        return [Image.new("RGB", (4, 4), (len(calls), place, 0)) for place in range(len(prompts))]

    monkeypatch.setattr(drawing, "generate", generate)
    monkeypatch.setattr(drawing, "check_class_prompts", lambda pipeline, prompts: None)
    return calls


def sample(folder: Path, *prompts: str, **changes: Any) -> Path:
    more = {"num": 2} | {name: changes.pop(name) for name in ("num", "negative_prompt") if name in changes}
    return drawing.sample_to_folder(
        None, list(prompts), folder, replace(OPTIONS, **changes), on_batch=lambda done, total: None, **more
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("second", [("a rose",), ("a pizza",), ("a pizza", "a rose")])
@pytest.mark.parametrize("changes", [{}, {"steps": 9}, {"num": 1}])
def test_a_second_set_of_samples_keeps_the_first(
    second: tuple[str, ...], changes: dict[str, Any], drawn: list, tmp_path: Path
):
    first = sample(tmp_path, "a rose")
    before = contents(tmp_path)
    assert sorted(before) == ["a-rose-seed1-000.png", "a-rose-seed1-001.png", "grid-seed1.png"]
    grids = [first, *(sample(tmp_path, *second, **changes) for _ in range(2))]
    assert [grid.name for grid in grids] == ["grid-seed1.png", "grid-seed1-set2.png", "grid-seed1-set3.png"]
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == 3 + 2 * (1 + len(second) * changes.get("num", 2))


def test_a_file_of_somebody_else_is_refused(drawn: list, tmp_path: Path):
    (tmp_path / "a-rose-seed1-000.png").write_bytes(b"mine")
    with pytest.raises(RunError, match="not an image that davae wrote"):
        sample(tmp_path, "a rose")
    assert not drawn, "before any work"


def test_calls_at_once_take_different_names(drawn: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grids: list[Path] = []
    draw = drawing.generate

    def meanwhile(*given: Any, **options: Any) -> list[Image.Image]:
        images = draw(*given, **options)
        if len(drawn) == 1:  # others begin and end while the first draws
            grids.extend([sample(tmp_path, "a rose"), sample(tmp_path, "a pizza")])
        return images

    monkeypatch.setattr(drawing, "generate", meanwhile)
    grids.append(sample(tmp_path, "a rose"))
    assert sorted(grid.name for grid in grids) == ["grid-seed1-set2.png", "grid-seed1-set3.png", "grid-seed1.png"]
    assert len(contents(tmp_path)) == 9
    pixels = {path: Image.open(path).getpixel((0, 0)) for path in tmp_path.iterdir()}
    for grid, call in zip(grids, (2, 3, 1), strict=True):
        own = [path for path in pixels if ("set2" in path.name, "set3" in path.name) == (call == 2, call == 3)]
        assert grid in own
        assert {pixels[path][0] for path in own} == {call}


def test_names_are_taken_when_they_are_chosen(tmp_path: Path):
    first, second = (drawing.free_places(tmp_path / "new", ["a rose"], 1) for _ in range(2))
    assert not set(first) & set(second)
    third = drawing.free_places(tmp_path / "new", ["a pizza"], 1)  # after a process that was killed
    assert [places[-1].name for places in (first, second, third)] == [
        "grid-seed1.png",
        "grid-seed1-set2.png",
        "grid-seed1-set3.png",
    ]


def test_a_drawing_that_fails_gives_its_names_back(drawn: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw = drawing.generate

    def stopped(pipeline: Any, prompts: list[str], how: SamplingOptions, **options: Any) -> list[Image.Image]:
        if options["first"] == 4 or "pizza" in prompts[0]:
            raise KeyboardInterrupt
        return draw(pipeline, prompts, how, **options)

    monkeypatch.setattr(drawing, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path, "a pizza")
    assert not contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path, "a rose", num=5)
    assert sorted(contents(tmp_path)) == [f"a-rose-seed1-00{number}.png" for number in range(4)], "those are kept"
    assert sample(tmp_path, "a rose").name == "grid-seed1-set2.png"


def test_many_images_are_neither_kept_nor_on_the_sheet(drawn: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alive: list[int] = []
    made: list[weakref.ref[Image.Image]] = []

    def draw(pipeline: Any, prompts: list[str], how: SamplingOptions, **options: Any) -> list[Image.Image]:
        images = [Image.new("RGB", (4, 4)) for _ in prompts]
        made.extend(weakref.ref(image) for image in images)
        alive.append(sum(image() is not None for image in made))
        return images

    monkeypatch.setattr(drawing, "generate", draw)
    for num, size in ((2, (2, 32)), (100, (64, 1))):
        sheet = sample(tmp_path, *("a rose" for _ in range(200 // num)), num=num)
        assert Image.open(sheet).size == tuple(8 * count - 4 for count in size)
        assert len(list(tmp_path.glob("a-rose-*.png"))) == 200
        assert max(alive) <= drawing.ON_SHEET + 2 * OPTIONS.batch_size
        shutil.rmtree(tmp_path)


def test_a_sheet_of_previews_grows_with_the_first_images_alone(tmp_path: Path):
    strip, heights = drawing.Strip(tmp_path / "previews-grid-seed1.png"), []
    for first in range(0, 200, 4):
        strip.first = first
        for step in (2, 4):
            strip.add(step, [Image.new("RGB", (4, 4)) for _ in range(4)])
        heights.append((Image.open(strip.path).height + 4) // 8)
    assert heights == [*range(4, 65, 4), *[4] * 34], "all of the first 64, then those that are being drawn"
    assert Image.open(strip.path).width == 2 * 8 - 4


def test_what_is_typed_reaches_the_pipeline(drawn: list, tmp_path: Path):
    sample(tmp_path, "a rose", resolution=(64, 96), negative_prompt="blue")
    assert (drawn[0]["how"].resolution, drawn[0]["negative_prompt"]) == ((64, 96), "blue")
    assert image_size(None, 64, 96) == (64, 96)
    assert image_size(None, 64, 64) == image_size(64, None, None) == 64
    for sizes in ((None, 64, None), (None, None, 64), (64, 64, 64)):
        with pytest.raises(RecipeError, match=r"--(height|width|resolution): "):
            image_size(*sizes)


def run_folder(path: Path, loss: float) -> Path:
    path.mkdir()
    records = [{"stage": "stage2", "step": n, "loss_base": loss, "loss_detail": loss} for n in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_figures_of_two_runs_are_two_files(tmp_path: Path):
    one, two = run_folder(tmp_path / "one", 1.0), run_folder(tmp_path / "two", 2.0)
    out = tmp_path / "figures"
    first = curves_figure(one, out)
    kept = first.read_bytes(), first.with_suffix(".json").read_bytes()
    second = curves_figure(two, out)
    assert (first.name, second.name) == ("curves.png", "curves-2.png")
    assert (first.read_bytes(), first.with_suffix(".json").read_bytes()) == kept
    assert curves_figure(one, out) == first, "the same figure again takes its own place"
    assert curves_figure(two, out) == second
    assert json.loads(second.with_suffix(".json").read_text())["last"]["loss_base"] == 2.0
    compared = [compared_runs_figure({"a": one, "b": two}, out), compared_runs_figure({"a": one, "b": one}, out)]
    assert [path.name for path in compared] == ["compare.png", "compare-2.png"]


def test_settings_of_a_figure_belong_to_its_name(tmp_path: Path):
    for settings, name in (({"num": 8}, "spectra"), ({"num": 9}, "spectra-2"), ({"num": 8}, "spectra")):
        figures = {"vae": "v", "data": "d", "settings": settings, "groups": {}}
        assert write_figure(tmp_path, "spectra", Image.new("RGB", (4, 4)), figures).stem == name
    save_image(Image.new("RGB", (4, 4)), tmp_path / "latents.png")  # whose figures are gone
    assert write_figure(tmp_path, "latents", Image.new("RGB", (4, 4)), {"vae": "v"}).stem == "latents-2"
