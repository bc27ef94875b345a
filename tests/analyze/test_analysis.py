"""Figures of the paper: closed forms of their numbers, and `davae analyze` on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, tiny_autoencoder, tiny_upgrade_recipe
from PIL import Image

from davae import DetailVAE
from davae.analyze.curves import compared_runs_figure, curves_figure
from davae.analyze.figure import contact_sheet
from davae.analyze.latents import (
    class_knowledge,
    embed_points,
    latents_figure,
    pca_images,
    raw_latents,
    scatter_plot,
)
from davae.analyze.sensitivity import UNIT_NORMAL, reconstructions, sensitivity_figure
from davae.analyze.spectra import radial_power, spectra_figure
from davae.commands import analyze
from davae.data.images import to_images
from davae.dataset.look import batches
from davae.errors import DataError, ModelError
from davae.evaluate.generation import real_pictures
from davae.evaluate.reconstruction import evaluate_reconstruction
from davae.latent import LatentLayout
from davae.pretrained.autoencoders import load_detail_vae
from davae.recipes import validate
from davae.runs.upgrade import Upgrade
from davae.vae.base import image_side


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
    shown = np.asarray(pca_images(plane, 4)[0], dtype=int)
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
    with pytest.raises(ValueError, match=r"3 images are too few .* --num"):
        class_knowledge(torch.randn(3, 2, 4, 4), [1, 2, 2])
    with pytest.raises(DataError, match="each of the 8 images has a class of its own; take more with --num"):
        class_knowledge(torch.randn(8, 2, 4, 4), list(range(8)))


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
    rows = numbers(sensitivity_figure(vae, str(tiny_base), data, tmp_path, num=8, held_out=0.0))["rows"]
    assert {"full", "zero detail", "random detail"} <= set(rows)
    assert all(row["pictures"] == 8 for row in rows.values())
    assert all(row["rfd_lite0"] >= 0 for row in rows.values())
    assert rows["random detail, N(0, I)"]["random"] == "N(0, I), as in the paper"

    groups = numbers(spectra_figure(vae, data, tmp_path, num=12, held_out=0.0))["groups"]
    assert len(groups["z_d"]["power"]) == len(groups["z"]["frequency"]) == 5  # 8 positions: rings 0 to 4
    assert len(groups["z_d"]["energy"]) == 5

    found = numbers(latents_figure(vae, vae, data, tmp_path, num=12, held_out=0.0))["rows"]
    assert found["aligned z_d"] == found["unaligned z_d"]
    assert found["z"]["alignment_error_over_variance"] is None
    scatter = numbers(tmp_path / "latents-points.png")
    assert [len(places) for places in scatter["points"].values()] == [12] * 3
    assert sorted(scatter["labels"]) == [0] * 6 + [1] * 6
    assert found["aligned z_d"]["alignment_error_over_variance"] > 0

    assert numbers(curves_figure(run, tmp_path))["last"]["step"] == 4
    side_by_side = numbers(compared_runs_figure({"this": run, "again": run}, tmp_path))
    assert side_by_side["this"]["last"] == side_by_side["again"]["last"]
    with pytest.raises(DataError, match="a class for every image"):
        latents_figure(vae, None, str(picture_folder), tmp_path, num=12, held_out=0.0)
    with pytest.raises(ModelError, match="needs a DetailVAE"):
        spectra_figure(str(tiny_base), data, tmp_path, num=8, held_out=0.0)
    with pytest.raises(ModelError, match="no two steps of stage 2"):
        curves_figure(tmp_path, tmp_path)


def test_originals_are_those_of_the_latents_below_them(
    run: Path, by_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 12 images 10 are encoded: the first eight of these are shown, not another choice of eight."""
    shown: dict[str, list] = {}
    monkeypatch.setattr(
        "davae.analyze.latents.contact_sheet", lambda rows, side: shown.update(rows) or contact_sheet(rows, side)
    )
    latents_figure(str(run / "vae"), None, str(by_class), tmp_path, num=10, held_out=0.0)
    images = real_pictures(str(by_class), image_side(load_detail_vae(run / "vae")), 0.0, "train")
    first = [image for batch in batches(images, 10, 4) for image in to_images(batch)][:8]
    assert [image.tobytes() for image in shown["original"]] == [image.tobytes() for image in first]


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Path] = {}
    monkeypatch.setattr("davae.analyze.curves.compared_runs_figure", lambda named, out: drawn.update(named) or out)
    analyze.compare([Path("a/x"), Path("b/x")], tmp_path)
    assert list(drawn) == ["a/x", "b/x"]
    drawn.clear()
    analyze.compare([Path("a/x"), Path("b/y")], tmp_path)
    assert list(drawn) == ["x", "y"]


def test_absolute_energy_keeps_what_standardising_takes_away():
    noise = torch.randn(64, 2, 16, 16) * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    found = radial_power(noise)
    assert np.abs(found.power[1:] - 1).max() < 0.15
    assert np.abs(found.energy[1:] / 5 - 1).max() < 0.15  # (1 + 9) / 2, the mean variance
    assert np.allclose(radial_power(2 * noise).energy, 4 * found.energy)


def test_points_of_one_class_lie_together():
    labels = [i % 3 for i in range(45)]
    centres = 8.0 * torch.randn(3, 4, 1, 1)
    points = embed_points(torch.stack([centres[label] for label in labels]) + torch.randn(45, 4, 4, 4))
    assert points.shape == (45, 2)
    means = np.stack([points[np.equal(labels, label)].mean(0) for label in range(3)])
    nearest = np.linalg.norm(points[:, None] - means[None], axis=-1).argmin(1)
    assert (nearest == labels).mean() > 0.9
    assert scatter_plot({"z": points}, labels).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="too few for a scatter"):
        embed_points(torch.randn(3, 2, 4, 4))


class Encoder:
    """Latents that hold the brightness of each image."""

    device, layout = torch.device("cpu"), LatentLayout(1, 1)

    def encode_raw(self, images: torch.Tensor) -> Any:
        mean = images.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return SimpleNamespace(z=mean, mean=mean)


def test_labels_stay_with_their_images_where_one_cannot_be_read(tmp_path: Path):
    """Sixteen a batch: the damaged one is the third of twenty."""
    for number in range(20):
        folder = tmp_path / ("dark", "light")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (200 * (number % 2), 0, 0)).save(folder / f"{number:02d}.png")
    pictures = real_pictures(str(tmp_path), 32, 0.0, "train")
    damaged = tmp_path / "dark" / "04.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    z, z_d, labels = raw_latents(Encoder(), pictures, 20)  # type: ignore[arg-type]
    assert len(z) == len(z_d) == len(labels) == 19
    assert [float(value) > -0.95 for value in z.flatten()] == [label == 1 for label in labels]


def test_random_detail_of_the_paper_is_not_that_of_the_training_set():
    base = tiny_autoencoder()
    vae = DetailVAE.from_base(base, 8)
    vae.set_detail_statistics(torch.full((8,), 3.0), torch.full((8,), 0.1))
    seen: list[torch.Tensor] = []
    decode = vae.decode
    vae.decode = lambda latents: seen.append(vae.layout.split(vae.denormalise(latents))[1]) or decode(latents)  # type: ignore[method-assign]
    ways = reconstructions(vae, base, unit_normal=True)
    assert list(ways) == ["base + bicubic", "zero detail", "random detail", UNIT_NORMAL, "full"]
    assert UNIT_NORMAL not in reconstructions(vae, base)
    for name in ("random detail", UNIT_NORMAL):
        ways[name](torch.rand(4, 3, 32, 32) * 2 - 1)
    assert abs(float(seen[0].mean()) - 3) < 0.1
    assert abs(float(seen[0].std()) - 0.1) < 0.02
    assert abs(float(seen[1].mean())) < 0.1
    assert abs(float(seen[1].std()) - 1) < 0.1


def test_an_upgrade_from_another_size_is_measured_at_the_size_that_it_was_trained_on(tmp_path: Path):
    """As SD3.5 from 512 to 1024 px: the config's default is twice the base's own 1024."""
    vae = DetailVAE.from_base(tiny_autoencoder(), detail_channels=4)
    default = image_side(vae)
    assert default == vae.config["sample_size"]
    vae.register_to_config(resolution=default // 2)
    vae.save_pretrained(tmp_path / "vae")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        picture(number, default // 2, default // 2).save(images / f"{number}.png")
    spectra_figure(str(tmp_path / "vae"), str(images), tmp_path / "figure", num=8, held_out=0.0)
    found = evaluate_reconstruction(str(tmp_path / "vae"), str(images), None, 8, 0.0)
    assert found["resolution"] == default // 2
