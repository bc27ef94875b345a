"""Figures of the paper: closed forms of their numbers, and `davae analyze` on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, tiny_upgrade_recipe
from PIL import Image

from davae.analysis import compare, curves, latents, sensitivity, spectra
from davae.analyze.latent_maps import class_knowledge, pca_pictures
from davae.analyze.spectra import radial_power
from davae.cli import analyze
from davae.data.pictures import DataError
from davae.models.pipeline import ModelError
from davae.recipes import validate
from davae.train.upgrade import Upgrade


def test_white_noise_has_power_one_and_a_wave_lies_at_its_frequency():
    flat = radial_power(torch.randn(64, 4, 32, 32))
    assert np.abs(flat.power[1:] - 1).max() < 0.08
    position = torch.arange(32, dtype=torch.float64)
    wave = torch.sin(2 * torch.pi * 5 / 32 * position).expand(1, 1, 32, 32)
    peaked = radial_power(wave)
    assert peaked.frequency[peaked.power.argmax()] == 5 / 32
    # two coefficients of the ring hold all the power of a 32x32 picture of variance 1
    axis = np.fft.fftfreq(32, 1 / 32)
    ring = np.round(np.hypot(axis[:, None], axis[None])).astype(int) == 5
    assert peaked.power[5] * ring.sum() == pytest.approx(32 * 32)
    assert peaked.high_share == pytest.approx(0, abs=1e-12)


def test_high_share_tells_fine_from_coarse():
    noise = torch.randn(8, 2, 32, 32)
    coarse = torch.nn.functional.interpolate(torch.randn(8, 2, 8, 8), size=32, mode="bicubic")
    assert radial_power(coarse).high_share < 0.2 < 0.6 < radial_power(noise).high_share


def test_spectra_refuse_what_has_no_rings():
    with pytest.raises(ValueError, match="square latents"):
        radial_power(torch.randn(1, 1, 8, 4))


def test_pca_pictures_show_the_main_direction():
    plane = torch.zeros(2, 5, 4, 4)
    plane[:, :, :, 2:] = torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0]).view(5, 1, 1)
    plane += 0.01 * torch.randn_like(plane)
    shown = np.asarray(pca_pictures(plane, 4)[0], dtype=int)
    assert np.abs(shown[:, :2, 0].mean() - shown[:, 2:, 0].mean()) > 200  # the first component splits left from right


def test_a_probe_finds_classes_where_there_are_some():
    labels = [i % 4 for i in range(400)]
    centres = 2.0 * torch.randn(4, 6, 1, 1)
    known = class_knowledge(torch.stack([centres[label] for label in labels]) + torch.randn(400, 6, 4, 4), labels)
    unknown = class_knowledge(torch.randn(400, 6, 4, 4), labels)
    assert known.probe_accuracy > 0.95
    assert known.silhouette > unknown.silhouette + 0.2
    assert abs(unknown.probe_accuracy - unknown.chance) < 0.12
    with pytest.raises(ValueError, match="two classes"):
        class_knowledge(torch.randn(4, 2, 4, 4), [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"3 pictures are too few .* --num"):
        class_knowledge(torch.randn(3, 2, 4, 4), [1, 2, 2])


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    for label in ("dark", "light"):
        (folder / label).mkdir()
        for number in range(6):
            shade = (0.3 if label == "dark" else 1.0) * np.asarray(picture(number), dtype=float)
            Image.fromarray(shade.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tiny_base: Path, by_class: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = validate(tiny_upgrade_recipe(tiny_base, by_class), "tiny")
    run = Upgrade(recipe, tmp_path_factory.mktemp("run") / "out", lambda progress: None)  # type: ignore[arg-type]
    run.run()
    return run.out


def numbers(path: Path) -> dict:
    assert Image.open(path).size[0] > 100
    return json.loads(path.with_suffix(".json").read_text())


def test_every_figure_of_a_run(run: Path, tiny_base: Path, by_class: Path, picture_folder: Path, tmp_path: Path):
    vae, data = str(run / "vae"), str(by_class)
    rows = numbers(sensitivity(vae, str(tiny_base), data, tmp_path, num=8, held_out=0.0))["rows"]
    assert {"full", "zero detail", "random detail"} <= set(rows)
    assert all(row["pictures"] == 8 for row in rows.values())

    groups = numbers(spectra(vae, data, tmp_path, num=12, held_out=0.0))["groups"]
    assert len(groups["z_d"]["power"]) == len(groups["z"]["frequency"]) == 5  # 8 positions: rings 0 to 4

    found = numbers(latents(vae, vae, data, tmp_path, num=12, held_out=0.0))["rows"]
    assert found["aligned z_d"] == found["unaligned z_d"]
    assert found["z"]["alignment_error_over_variance"] is None
    assert found["aligned z_d"]["alignment_error_over_variance"] > 0

    assert numbers(curves(run, tmp_path))["last"]["step"] == 4
    side_by_side = numbers(compare({"this": run, "again": run}, tmp_path))
    assert side_by_side["this"]["last"] == side_by_side["again"]["last"]
    with pytest.raises(DataError, match="a class for every picture"):
        latents(vae, None, str(picture_folder), tmp_path, num=12, held_out=0.0)
    with pytest.raises(ModelError, match="needs a DetailVAE"):
        spectra(str(tiny_base), data, tmp_path, num=8, held_out=0.0)
    with pytest.raises(ModelError, match="no steps of stage 2"):
        curves(tmp_path, tmp_path)


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: dict[str, Path] = {}
    monkeypatch.setattr("davae.analysis.compare", lambda named, out: told.update(named) or out)
    analyze.compare([Path("a/x"), Path("b/x")], tmp_path)
    assert list(told) == ["a/x", "b/x"]
    told.clear()
    analyze.compare([Path("a/x"), Path("b/y")], tmp_path)
    assert list(told) == ["x", "y"]
