"""Patch distance and image spectra against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import davae.evaluate.generation
from davae.errors import DataError, DavaeError
from davae.evaluate.detail import image_patches, measure_images, patch_places
from davae.evaluate.features import Features
from davae.evaluate.spectra import ImageSpectrum, SpectrumMeter, top_octave_error


def spectrum(images: torch.Tensor, size: int) -> ImageSpectrum:
    meter = SpectrumMeter()
    for part in images.split(size):
        meter.add(part)
    return meter.result()


def test_an_image_of_four_cells_is_cropped_whole():
    images = torch.rand(2, 3, 8, 8)
    patches = image_patches(images, 4)
    assert patches.shape == (8, 3, 4, 4)
    rows = [torch.cat([patches[i], patches[i + 1]], dim=2) for i in (4, 6)]
    assert torch.equal(torch.cat(rows, dim=1), images[1])


@pytest.mark.parametrize(("height", "width"), [(4, 4), (9, 4), (7, 13), (40, 64), (1024, 4)])
def test_crops_lie_inside_and_do_not_overlap(height: int, width: int):
    for number in range(5):
        places = patch_places(height, width, 4, number)
        assert 1 <= len(places) == min(4, (height // 4) * (width // 4))
        covered = np.zeros((height, width), int)
        for top, left in places:
            assert top >= 0
            assert left >= 0
            covered[top : top + 4, left : left + 4] += 1
        assert covered.max() == 1
        assert covered.sum() == 16 * len(places)


def test_crops_of_an_image_do_not_depend_on_its_batch():
    images = torch.rand(6, 3, 16, 16)
    parts = [image_patches(images[start : start + 2], 4, start) for start in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), image_patches(images, 4))
    assert len({tuple(patch_places(16, 16, 4, number)) for number in range(8)}) > 1


def test_spectrum_of_noise_is_flat_and_of_a_wave_one_ring():
    noise = torch.randn(200, 1, 16, 16, dtype=torch.float64).expand(-1, 3, -1, -1) * 0.3
    found = spectrum(noise, 64)
    assert found.frequency.tolist() == [k / 16 for k in range(9)]
    np.testing.assert_allclose(found.power[1:], 0.09, rtol=0.08)
    x = torch.arange(16, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * 3 * x / 16).expand(1, 3, 16, 16)
    power = spectrum(wave, 1).power
    rings = np.round(np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(16)[None]) * 16)
    assert power[3] == pytest.approx(16 * 16 / 2 / (rings == 3).sum())  # two coefficients of 16^2/4 each
    assert np.abs(np.delete(power, 3)).max() < 1e-20


def test_spectrum_does_not_depend_on_batches_and_takes_any_ratio():
    images = torch.rand(7, 3, 12, 20) * 2 - 1
    np.testing.assert_allclose(spectrum(images, 2).power, spectrum(images, 7).power, rtol=1e-12)
    meter = SpectrumMeter()
    meter.add(images)
    with pytest.raises(DataError, match="12x12 pixels, the ones before 20x12"):
        meter.add(images[..., :12])


def test_top_octave_error_is_in_decibel_with_a_sign():
    real = ImageSpectrum(np.array([0, 0.25, 0.375, 0.5]), np.array([9.0, 3.0, 2.0, 1.0]))
    assert top_octave_error(real, real) == (0.0, 0.0)
    blurred = ImageSpectrum(real.frequency, np.array([9.0, 300.0, 0.02, 0.01]))
    assert top_octave_error(blurred, real) == pytest.approx((20.0, -20.0))
    mixed = ImageSpectrum(real.frequency, np.array([9.0, 3.0, 20.0, 0.1]))
    assert top_octave_error(mixed, real) == pytest.approx((10.0, 0.0))
    assert top_octave_error(ImageSpectrum(real.frequency, np.zeros(4)), real)[1] < -1000
    with pytest.raises(DataError, match="differ in size"):
        top_octave_error(ImageSpectrum(real.frequency[:3], real.power[:3]), real)


def test_both_verbs_report_fine_detail_and_draw_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(davae.evaluate.generation, "make_extractor", lambda name, weights: Corners())
    rng = np.random.default_rng(0)
    for name, low in (("sharp", 0), ("other", 0), ("smooth", 120)):
        images = rng.integers(low, 256 - low, (8, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    options = {"num": None, "features": "lite0", "feature_weights": None}
    found = {
        name: davae.evaluate.generation.evaluate_pictures(
            f"{tmp_path}/{name}.npz",
            f"{tmp_path}/sharp.npz",
            16,
            patch_size=8,
            spectrum=tmp_path / f"{name}.png",
            **options,
        )
        for name in ("sharp", "other", "smooth")
    }
    assert found["sharp"]["patch_corner"] == pytest.approx(0, abs=1e-9)
    assert found["sharp"]["spectrum_top_octave_rms_db"] == 0
    assert found["smooth"]["patch_corner"] > found["other"]["patch_corner"]
    assert found["smooth"]["spectrum_top_octave_db"] == pytest.approx(20 * np.log10(16 / 256), abs=1.0)
    assert abs(found["other"]["spectrum_top_octave_db"]) < 1
    assert (found["other"]["patches"], found["other"]["patches_real"], found["other"]["patch_size"]) == (32, 32, 8)
    with Image.open(tmp_path / "smooth.png") as drawn:
        assert drawn.size[0] > 300
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(DavaeError, match=r"mine\.png"):
        davae.evaluate.generation.evaluate_pictures(
            f"{tmp_path}/sharp.npz", f"{tmp_path}/sharp.npz", 16, spectrum=tmp_path / "mine.png", **options
        )


class Corners:
    """Features are the first pixel of each image."""

    name = "corner"

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images[:, :, 0, 0])


def test_a_set_is_measured_once_whole_and_in_crops():
    images = torch.rand(5, 3, 8, 8)
    found = measure_images(images.split(2), Corners(), 4)
    assert torch.equal(found.whole.features, images[:, :, 0, 0])
    assert found.patches is not None
    assert torch.equal(found.patches.features, image_patches(images, 4)[:, :, 0, 0])
    for size in (0, 8, 16):
        assert measure_images([images], Corners(), size).patches is None
    with pytest.raises(ValueError, match="no images"):
        measure_images([], Corners())
