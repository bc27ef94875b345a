"""A figure of other settings or data takes a free name, and so does the summary of its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture, tiny_autoencoder
from upgraded_tiny import assembled

from davae import DetailVAE
from davae.analyze import gap, sensitivity
from davae.analyze.diffusability import diffusability_figure
from davae.analyze.gap import gap_figure
from davae.analyze.sensitivity import sensitivity_figure
from davae.analyze.spectra import spectra_figure
from davae.dataset import encoding
from davae.errors import RunError
from davae.evaluate.features import Lite0Features
from davae.sample.open import SamplingOptions


@pytest.fixture(scope="module")
def places(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sets of images of other numbers, an autoencoder with its base, and an upgraded model."""
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    base = tiny_autoencoder()
    base.save_pretrained(folder / "base")
    DetailVAE.from_base(base, 4).save_pretrained(folder / "vae")
    assembled(tiny_base).save_pretrained(folder / "upgrade")
    for name, number in (("first", 16), ("second", 20)):
        (folder / name).mkdir()
        for place in range(number):
            picture(place, 64, 64).save(folder / name / f"{place:02d}.png")
            (folder / name / f"{place:02d}.txt").write_text(f"image {place}")
    return {name: str(folder / name) for name in ("base", "vae", "upgrade", "first", "second")}


def spectra(places: dict[str, str], data: str, out: Path, num: int = 8) -> Path:
    return spectra_figure(places["vae"], places[data], out, num=num, held_out=0.0)


def diffusability(places: dict[str, str], data: str, out: Path, num: int = 8, **more: Any) -> Path:
    return diffusability_figure(
        places["vae"], places[data], out, num=num, held_out=0.0, **({"probe_steps": 0} | more)
    )


def decoded(places: dict[str, str], data: str, out: Path, num: int = 8, **more: Any) -> Path:
    return sensitivity_figure(places["vae"], places["base"], places[data], out, num=num, held_out=0.0, **more)


def split(places: dict[str, str], data: str, out: Path, num: int = 4, **more: Any) -> Path:
    options = SamplingOptions(1, 1.0, more.pop("seed", 0), batch_size=4)
    more = {"patch_size": 16} | more
    return gap_figure(places["upgrade"], places[data], out, options, num=num, held_out=0.5, **more)


FIGURES: dict[str, Callable[..., Path]] = {
    "spectra": spectra,
    "diffusability": diffusability,
    "sensitivity": decoded,
    "gap": split,
}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, decoded or compared: names and summaries are those of a whole call."""
    for module in (gap, sensitivity):
        monkeypatch.setattr(module, "make_extractor", lambda features, weights: Lite0Features())
    monkeypatch.setattr(sensitivity, "perceptual_distances", lambda network, weights: {})
    monkeypatch.setattr(sensitivity, "reconstructions", lambda *models, **options: {})
    monkeypatch.setattr(gap, "_sets", lambda pipe, real, *options: dict.fromkeys((*gap.COLORS, gap.NO_DETAIL), real))
    monkeypatch.setattr(gap, "real_images", lambda *options: None)
    monkeypatch.setattr(gap, "measure_images", lambda *options: None)
    monkeypatch.setattr(gap, "compare_sets", lambda *options: {"fd_lite0": 1.0, "patch_fd_lite0": 1.0})


def of_figure(done: Path) -> dict[str, bytes]:
    return {name: done.with_suffix(name).read_bytes() for name in (".png", ".json", ".data.json")}


def check_pairs(out: Path) -> None:
    """Every figure of the folder has a summary of its own, and no summary is alone."""
    summaries = {path.name.removesuffix(".data.json") for path in out.glob("*.data.json")}
    assert summaries == {path.stem for path in out.glob("*.png") if "images" not in path.stem}


def summarised(done: Path) -> str:
    return json.loads(done.with_suffix(".data.json").read_text())["source"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_summary_has_the_name_of_its_figure(name: str, places: dict[str, str], tmp_path: Path):
    draw = FIGURES[name]
    first = draw(places, "first", tmp_path)
    kept = of_figure(first)
    second = draw(places, "second", tmp_path)
    third = draw(places, "second", tmp_path, num=5)
    assert [path.stem for path in (first, second, third)] == [name, f"{name}-2", f"{name}-3"]
    assert of_figure(first) == kept
    assert [summarised(path) for path in (first, second, third)] == [places[n] for n in ("first", "second", "second")]
    kept = of_figure(second)
    assert draw(places, "first", tmp_path) == first, "the same figure again takes its own place"
    assert of_figure(second) == kept
    check_pairs(tmp_path)
    assert summarised(first) == places["first"]


@pytest.mark.parametrize("name", ["spectra", "sensitivity"])
def test_autoencoders_code_as_many_images_as_fit(
    name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    moments = DetailVAE._moments
    monkeypatch.setattr(encoding, "free_bytes", lambda device: 0)
    monkeypatch.setattr(DetailVAE, "_moments", lambda vae, x, *more: seen.append(len(x)) or moments(vae, x, *more))
    FIGURES[name](places, "first", tmp_path, num=4)
    assert set(seen) == {1}


def test_every_setting_of_a_figure_belongs_to_its_name(places: dict[str, str], tmp_path: Path):
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    kinds: dict[str, tuple[dict[str, Any], ...]] = {
        "gap": (
            {},
            {"features": "inception"},
            {"patch_size": 8},
            {"features": "inception", "patch_size": 8},
            {"features": "inception", "feature_weights": one},
            {"features": "inception", "feature_weights": two},
            {"seed": 1},
        ),
        "sensitivity": (
            {},
            {"features": "inception"},
            {"features": "inception", "feature_weights": one},
            {"features": "inception", "feature_weights": two},
            {"lpips": "alex"},
            {"lpips": "alex", "lpips_weights": str(one)},
            {"lpips": "alex", "lpips_weights": str(two)},
        ),
        "diffusability": ({}, {"seed": 1}, {"probe_steps": 1}),
    }
    for name, changes in kinds.items():
        out = tmp_path / name
        done = [FIGURES[name](places, "first", out, **change) for change in changes]
        assert [path.stem for path in done] == [name, *(f"{name}-{n}" for n in range(2, len(changes) + 1))]
        kept = {path.name: path.read_bytes() for path in out.glob(f"{name}*.json")}
        assert FIGURES[name](places, "first", out, **changes[-1]) == done[-1]
        again = {path.name: path.read_bytes() for path in out.glob(f"{name}*.json")}
        assert again.keys() == kept.keys()
        check_pairs(out)
        assert [place for place, content in kept.items() if again[place] != content] == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_summary_of_somebody_else_is_refused_before_any_work(name: str, places: dict[str, str], tmp_path: Path):
    nowhere = dict.fromkeys(places, "/nowhere")
    (tmp_path / f"{name}.data.json").write_text('{"mine": 1}')
    with pytest.raises(RunError, match=rf"{name}\.data\.json: it exists and is not a summary of images"):
        FIGURES[name](nowhere, "first", tmp_path)
    (tmp_path / f"{name}.data.json").unlink()
    FIGURES[name](places, "first", tmp_path)
    (tmp_path / f"{name}-2.data.json").write_text("mine")
    with pytest.raises(RunError, match=rf"{name}-2\.data\.json: it exists"):
        FIGURES[name](nowhere, "first", tmp_path)
    assert (tmp_path / f"{name}-2.data.json").read_text() == "mine"
