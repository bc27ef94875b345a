"""Nothing is written over without a word: samples and figures of another call keep their files."""

from __future__ import annotations

import json
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
