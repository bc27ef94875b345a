"""Baselines that enlarge pictures: filters, networks, commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.data.images import ImageDataset, to_tensor
from davae.errors import ModelError
from davae.evaluate.upscale import make_upscaler
from davae.lab.super_resolution import SuperResolutionTask, build_network, train_super_resolution
from davae.recipes import SuperResolutionRecipe, validate
from davae.train.random import SampleRandom
from davae.vae.blocks import downsample

COPY = (
    f'{sys.executable} -c "import pathlib, sys; from PIL import Image; '
    "[Image.open(p).resize((40, 40)).save(pathlib.Path(sys.argv[2]) / p.name) "
    'for p in pathlib.Path(sys.argv[1]).iterdir()]" {input} {output}'
)


def test_filters_are_pillow_s():
    small = picture(0, 16, 16)
    for name, kind in (("bilinear", Image.Resampling.BILINEAR), ("lanczos", Image.Resampling.LANCZOS)):
        mine = make_upscaler(name, 32)([small])[0]
        assert np.array_equal(np.asarray(mine), np.asarray(small.resize((32, 32), kind)))


def test_any_command_can_enlarge():
    small = [picture(number, 16, 16) for number in range(3)]
    large = make_upscaler(COPY, 40)(small)
    assert [p.size for p in large] == [(40, 40)] * 3
    assert np.array_equal(np.asarray(large[2]), np.asarray(small[2].resize((40, 40))))
    assert make_upscaler(COPY, 32)(small)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("sharpest", "enlarger sharpest: neither bilinear, bicubic, lanczos"),
        ("false {input} {output}", "command failed"),
        ("true {input} {output}", "left no 00000.png"),
        ("no-such-program {input} {output}", "command failed.*No such file"),
    ],
)
def test_bad_upscalers(method: str, message: str):
    with pytest.raises(ModelError, match=message):
        make_upscaler(method, 32)([picture(0, 16, 16)])


def test_a_trained_network_enlarges(picture_folder: Path, tmp_path: Path):
    pytest.importorskip("spandrel")
    recipe = validate(
        {
            "kind": "super-resolution",
            "name": "tiny",
            "resolution": 32,
            "data": {"source": str(picture_folder), "holdout": 0.0},
            "network": {"channels": 8, "layers": 1, "max_steps": 120, "batch_size": 4, "lr": 0.005, "ema_decay": 0.9,
                        "lambda_lpips": 0.0},
        },
        "tiny",
    )  # fmt: skip
    assert isinstance(recipe, SuperResolutionRecipe)
    losses: list[float] = []
    weights = train_super_resolution(recipe, tmp_path / "sr", lambda progress: losses.append(progress.values["l1"]))
    assert losses[-1] < 0.8 * losses[0]
    again = train_super_resolution(recipe, tmp_path / "sr", lambda progress: pytest.fail("trained again"))
    assert again == weights

    truth = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(4)])
    small = [picture(number, 32, 32).resize((16, 16), Image.Resampling.BOX) for number in range(4)]
    large = make_upscaler(str(weights), 32)(small)
    network = build_network(recipe.network, 2)
    network.load_state_dict(load_file(weights))
    with torch.no_grad():
        direct = network(torch.stack([to_tensor(p) for p in small]) / 2 + 0.5).clamp(0, 1) * 2 - 1
    shown = torch.stack([to_tensor(p) for p in large])
    assert (shown - direct).abs().max() < 1.1 / 127.5  # spandrel runs what was trained, up to the rounding of pixels
    nearest = torch.stack([to_tensor(p.resize((32, 32), Image.Resampling.NEAREST)) for p in small])
    assert (shown - truth).abs().mean() < (nearest - truth).abs().mean()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"broken\.safetensors"):
        make_upscaler(str(broken), 32)


def test_a_network_trains_on_what_files_hold(picture_folder: Path):
    """Bicubic reduction overshoots at edges: beyond [0,1] is information that no file has."""
    network = {"channels": 8, "layers": 1, "max_steps": 1, "batch_size": 1, "lambda_lpips": 0.0}
    data = {"source": str(picture_folder), "holdout": 0.0}
    sections = {"kind": "super-resolution", "name": "tiny", "resolution": 32, "data": data, "network": network}
    recipe = validate(sections, "tiny")
    assert isinstance(recipe, SuperResolutionRecipe)
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, small: Tensor) -> Tensor:
            seen.append(small)
            return self.scale * nn.functional.interpolate(small, scale_factor=2)

    task = SuperResolutionTask(recipe, Recorder(), cast(ImageDataset, None), torch.device("cpu"))
    square = -torch.ones(1, 3, 32, 32)
    square[..., 9:21, 7:23] = 1.0
    assert downsample(square, 2).amax() > 1.01
    task.loss("network", {"images": square}, 0, SampleRandom(0, "network", 0, 0, 1))
    pixels = seen[0] * 255
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert (pixels - pixels.round()).abs().max() < 1e-4


def test_a_network_s_file_runs_no_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("spandrel")

    class Planted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return "", self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.training = state[1]
            torch.save(torch.ones(1), "ran")

    torch.jit.script(Planted()).save(str(tmp_path / "network.pt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"network\.pt"):
        make_upscaler(str(tmp_path / "network.pt"), 32)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt"]
