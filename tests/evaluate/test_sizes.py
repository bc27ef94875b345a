"""Sizes that an autoencoder does not take are one line before the images are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_autoencoder

from davae import DetailVAE
from davae.analyze import sensitivity
from davae.commands.evaluate import evaluate_app
from davae.errors import ModelError
from davae.evaluate import reconstruction
from davae.lab.bench.vae import bench_vae


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders of 2 pixels a position, of 4 with the detail, and of 16."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_autoencoder()
    base.save_pretrained(folder / "base")
    DetailVAE.from_base(base, 4).save_pretrained(folder / "detail")
    tiny_autoencoder(levels=5).save_pretrained(folder / "deep")
    return folder


def refused(*_: object, **__: object) -> None:
    raise AssertionError("the images were looked at")


SIZES = (
    ("base", 33, "33 pixels: this AutoencoderKL .* divisible by 2, at least 12; use 32$"),
    ("base", 10, "10 pixels: .* use 12$"),  # SSIM has a window of 11
    ("base", 1, "1 pixels: .* use 12$"),
    ("detail", 34, "34 pixels: this DetailVAE .* divisible by 4, at least 12; use 32$"),
    ("detail", 33, "33 pixels: .* use 32$"),
    ("detail", 8, "8 pixels: .* use 12$"),
    ("deep", 100, "100 pixels: this AutoencoderKL .* divisible by 16, at least 16; use 96$"),
    ("deep", 24, "24 pixels: .* use 32$"),
)


@pytest.mark.parametrize(("name", "side", "message"), SIZES)
def test_reconstruction(name: str, side: int, message: str, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruction, "real_pictures", refused)
    words = ["--vae", str(models / name), "--data", "openmoji", "--resolution", str(side)]
    with pytest.raises(ModelError, match=message):
        evaluate_app(["reconstruction", *words], standalone_mode=False)


@pytest.mark.parametrize("name", ["base", "detail", "deep"])
def test_the_nearest_size_is_measured(name: str, models: Path, picture_folder: Path):
    for side in (12, 32):
        if name != "deep" or side == 32:
            found = reconstruction.evaluate_reconstruction(str(models / name), str(picture_folder), side, 2, 0.0)
            assert found["resolution"] == side
            assert -1 <= found["ssim"] <= 1, "not NaN"


@pytest.mark.parametrize(("name", "side"), [("base", 33), ("detail", 34), ("deep", 100)])
def test_the_bench_of_an_autoencoder(name: str, side: int, models: Path):
    with pytest.raises(ModelError, match=rf"^{side} pixels: .* divisible by"):
        bench_vae(str(models / name), resolution=side, tile=32, repeats=1)


def test_a_base_of_another_factor(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sensitivity, "real_pictures", refused)
    vae = DetailVAE.from_pretrained(models / "detail")
    vae.register_to_config(resolution=48)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"24 pixels: this AutoencoderKL .* divisible by 16"):
        sensitivity.sensitivity_figure(
            str(tmp_path / "vae"), str(models / "deep"), "openmoji", tmp_path / "out", num=8, held_out=0.0
        )
