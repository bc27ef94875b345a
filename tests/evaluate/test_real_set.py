"""Measurements of real images that evaluations share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import davae.evaluate.real_set
from davae.dataset.look import as_data, real_pictures
from davae.evaluate.detail import ImageSet
from davae.evaluate.features import Features
from davae.evaluate.real_set import real_images


class Corners:
    """Features that are pixels, and logits; counts its calls."""

    name = "fid"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Features:
        self.calls += 1
        return Features(images[:, 0, :2, :2].flatten(1).float(), images[:, 1, :1, :2].flatten(1).float())


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch) -> Corners:
    found = Corners()
    monkeypatch.setattr(davae.evaluate.real_set, "make_extractor", lambda name, weights: found)
    return found


def measured(folder: Path, keep: Path | None, patch_size: int = 16) -> ImageSet:
    davae.evaluate.real_set._measured.clear()  # as in a new process
    return real_images(
        real_pictures(str(folder), 32, 0.0, "train"), as_data(str(folder)), 0.0, "lite0", None, patch_size, keep
    )


def same(one: ImageSet, other: ImageSet) -> bool:
    assert one.patches is not None
    assert other.patches is not None
    pairs = [
        (one.whole.features, other.whole.features),
        (one.whole.logits, other.whole.logits),
        (one.patches.features, other.patches.features),
        (torch.from_numpy(one.spectrum.power), torch.from_numpy(other.spectrum.power)),
    ]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_a_later_process_reads_what_an_earlier_one_measured(picture_folder: Path, tmp_path: Path, corners: Corners):
    first = measured(picture_folder, tmp_path / "real")
    calls = corners.calls
    assert calls
    assert same(measured(picture_folder, tmp_path / "real"), first)
    assert corners.calls == calls
    assert same(measured(picture_folder, None), first)
    assert corners.calls == 2 * calls, "without a folder nothing is kept"
    measured(picture_folder, tmp_path / "real", patch_size=8)
    assert corners.calls > 2 * calls, "other crops are measured"


def test_features_of_another_network_are_not_those_of_its_weights(
    picture_folder: Path, tmp_path: Path, corners: Corners
):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    images, data = real_pictures(str(picture_folder), 32, 0.0, "train"), as_data(str(picture_folder))
    for number, name in enumerate(("lite0", "inception"), 1):
        real_images(images, data, 0.0, name, tmp_path / "weights.pth", keep=tmp_path / "real")
        assert len(list((tmp_path / "real").iterdir())) == number


def test_other_images_and_damaged_files_are_measured_anew(
    picture_folder: Path, tmp_path: Path, corners: Corners, caplog: pytest.LogCaptureFixture
):
    keep, images = tmp_path / "real", Path(shutil.copytree(picture_folder, tmp_path / "images"))
    first = measured(images, keep)
    (file,) = keep.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    calls = corners.calls
    assert same(measured(images, keep), first)
    assert corners.calls == 2 * calls
    assert "measured again" in caplog.text
    image = next(path for path in sorted(images.rglob("*")) if path.suffix == ".png")
    image.unlink()
    assert len(measured(images, keep).whole) == len(first.whole) - 1
