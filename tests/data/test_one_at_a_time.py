"""Report and measurements: one model at a time on the device, as many images at a time as asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_autoencoder
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from davae import DetailVAE
from davae.analyze.sensitivity import reconstructions
from davae.cli import app
from davae.dataset.encoding import coding_bytes, images_at_a_time
from davae.pretrained.memory_budget import OneOnDevice


class Moved:
    """A model that keeps where it is."""

    def __init__(self) -> None:
        self.place = "cpu"

    def to(self, place: Any) -> Moved:
        self.place = str(place)
        return self


def test_the_model_before_leaves_the_device():
    turn, models = OneOnDevice(torch.device("meta")), [Moved(), Moved(), Moved()]
    for number in (0, 1, 1, 2, 0):
        assert turn(models[number]) is models[number]
        assert [model.place for model in models] == ["meta" if n == number else "cpu" for n in range(3)]
    still = Moved()
    assert OneOnDevice(torch.device("cpu"))(still).place == "cpu"


def test_images_at_a_time_come_from_the_recipe_or_the_plan(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert images_at_a_time(None, 16, cpu, lambda: 1) == 16
    assert images_at_a_time(3, 16, cpu, lambda: 1) == 3
    monkeypatch.setattr("davae.dataset.encoding.free_bytes", lambda device: 100)
    assert [images_at_a_time(None, 16, cpu, lambda one=one: one) for one in (5, 30, 400)] == [16, 2, 1]
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    assert coding_bytes(vae, 32, torch.bfloat16) < coding_bytes(vae, 32, torch.float32)


def test_reconstructions_take_images_in_the_models_precision():
    vae, base = DetailVAE.from_base(tiny_autoencoder(), 8), tiny_autoencoder()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for name, reconstruct in reconstructions(vae.to(torch.bfloat16), base.to(torch.bfloat16)).items():
        assert reconstruct(images).dtype == torch.bfloat16, name


@pytest.mark.parametrize("options", [["--batch-size", "1"], ["--batch-size", "3", "--dtype", "bfloat16"]])
def test_evaluate_reconstruction_goes_by_its_batch_size(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, options: list[str]
):
    for number in range(3):
        Image.new("RGB", (32, 32), (40 * number, 90, 200)).save(tmp_path / f"{number}.png")
    vae, seen = DetailVAE.from_base(tiny_autoencoder(), 8), []
    plain = DetailVAE.encode

    def counting(self: DetailVAE, images: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((len(images), images.dtype))
        return plain(self, images, *rest, **named)

    monkeypatch.setattr(DetailVAE, "encode", counting)
    monkeypatch.setattr("davae.evaluate.reconstruction.open_autoencoder", lambda name: vae)
    monkeypatch.setattr("davae.evaluate.reconstruction.perceptual_distances", lambda *_: {})
    command = ["evaluate", "reconstruction", "--vae", "x", "--data", str(tmp_path), "--resolution", "32", *options]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert [size for size, _ in seen] == ([1, 1, 1] if options[1] == "1" else [3])
    assert ('"dtype": "bfloat16"' in found.output) == ("--dtype" in options)
    assert SimpleNamespace(dtype=seen[0][1]).dtype == (torch.bfloat16 if "--dtype" in options else torch.float32)
