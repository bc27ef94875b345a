"""Classes and weights that do not fit are one line before anything is drawn or measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture, tiny_autoencoder

from davae import DetailVAE
from davae.analyze import gap, retention
from davae.backbones.lightning_dit import LightningDiT
from davae.commands.analyze import analyze_app
from davae.commands.evaluate import evaluate_app
from davae.errors import DavaeError, ModelError
from davae.evaluate import enlarging, generation, reconstruction
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.sample.open import SamplingOptions


def class_model(channels: int, vae: Any) -> ClassConditionalPipeline:
    model = LightningDiT(
        input_size=8, patch_size=1, in_channels=channels, hidden_size=16, depth=1, num_heads=2, num_classes=2
    )  # fmt: skip
    return ClassConditionalPipeline(vae, model, class_names=["cat", "dog"])


@pytest.fixture(scope="module")
def models() -> dict[str, ClassConditionalPipeline]:
    torch.manual_seed(0)
    base = tiny_autoencoder()
    return {"base": class_model(4, base), "upgrade": class_model(12, DetailVAE.from_base(base, 8))}


def fail(*given: object, **named: object) -> None:
    raise AssertionError("it had begun")


@pytest.mark.parametrize(
    ("names", "message"),
    [([""], "needs a class for every image"), (["a", "b", "c"], "class label 2 is out of range: .* classes 0 to 1")],
)
@pytest.mark.parametrize("figure", ["gap", "retention", "enlarging"])
def test_images_without_the_classes_of_the_model(
    figure: str,
    names: list[str],
    message: str,
    models: dict[str, ClassConditionalPipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for number in range(18):
        folder = tmp_path / "images" / names[number % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, 40, 40).save(folder / f"{number:02d}.png")
    for module in (gap, retention, enlarging):
        monkeypatch.setattr(module, "open_model", lambda name, *_: (models[name], tmp_path))
    for module, work in ((gap, "generate"), (gap, "real_images"), (retention, "prediction_errors")):
        monkeypatch.setattr(module, work, fail)
    monkeypatch.setattr(enlarging, "_measured_rows", fail)
    data, options = str(tmp_path / "images"), SamplingOptions(2, 1.0, batch_size=4)
    measure: dict[str, Callable[[], Any]] = {
        "gap": lambda: gap.gap_figure("upgrade", data, tmp_path, options, num=16, held_out=0.5),
        "retention": lambda: retention.retention_figure(
            "base", "upgrade", data, tmp_path, options, num=16, held_out=0.0
        ),
        "enlarging": lambda: enlarging.evaluate_enlarging("upgrade", data, options, num=16, held_out=0.0),
    }
    with pytest.raises(DavaeError, match=message) as raised:
        measure[figure]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("evaluate reconstruction --vae micro", "--feature-weights"),
        ("evaluate generation --pipeline micro", "--feature-weights"),
        ("evaluate pictures --generated openmoji --resolution 64 --features lite0", "--feature-weights"),
        ("analyze gap micro-upgraded --held-out 0.1", "--feature-weights"),
        ("evaluate reconstruction --vae micro", "--lpips-weights"),
        ("evaluate enlarging --model micro-upgraded", "--lpips-weights"),
    ],
)
def test_weights_that_no_network_reads(words: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (gap, enlarging, generation, reconstruction):
        for work in ("open_model", "open_autoencoder", "real_pictures"):
            monkeypatch.setattr(module, work, fail, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"weights")
    verb, *more = words.split()
    app = evaluate_app if verb == "evaluate" else analyze_app
    with pytest.raises(ModelError, match=rf"^{flag} w.pth: read by .*; give both, or neither$"):
        app([*more, "--data", "openmoji", flag, "w.pth"], standalone_mode=False)
