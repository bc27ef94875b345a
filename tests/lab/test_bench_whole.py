"""A whole picture is the sum of its parts, each scaled from what was run to what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from davae.errors import ModelError
from davae.lab.bench import whole
from davae.lab.bench.clock import Spread
from davae.pretrained.shapes import read_shapes
from davae.pretrained.text_encoders import TextEncoder, text_encoders
from davae.zoo import resolve

SECONDS = 3.0


@pytest.fixture
def constant_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs once and takes as long."""

    def race(works: dict[str, Any], repeats: int) -> dict[str, Spread]:
        for work in works.values():
            work()
        return {name: Spread(SECONDS, SECONDS, SECONDS, repeats) for name in works}

    monkeypatch.setattr(whole, "race", race)


def measured(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"resolution": 128, "scale": 2, "detail_channels": None, "blocks": 99, "steps": 5}
    return whole.bench_whole(resolve("micro"), **{**settings, "guided": False, "repeats": 1, **changes})


@pytest.mark.usefixtures("constant_clock")
def test_parts_are_scaled_to_all_layers_and_steps():
    layers = {
        encoder.component: max(int(encoder.config.get(key) or 0) for key in whole.DEPTHS)
        for encoder in text_encoders(resolve("micro"), read_shapes(resolve("micro")).transformer_config)
    }
    assert len(layers) == 3
    text = sum(SECONDS * count / min(whole.LAYERS, count) for count in layers.values())
    figures = measured()
    parts = {"text": text, "transformer": 5 * SECONDS, "decoding": SECONDS}
    assert figures["native_seconds"] == figures["upgraded_seconds"] == pytest.approx(parts)
    assert figures["whole_speedup"] == pytest.approx(1.0)
    assert measured(guided=True)["native_seconds"]["text"] == pytest.approx(2 * text)


@pytest.mark.usefixtures("constant_clock")
def test_blocks_that_did_not_run_count_by_their_flops():
    """A third of the blocks stands for about three times its time: SD3's last block is cheaper, the rest is not scaled."""
    depth = int(read_shapes(resolve("micro")).transformer_config["num_layers"])
    seconds = measured(blocks=depth // 3)["native_seconds"]["transformer"]
    assert 2.5 * 5 * SECONDS < seconds < 3.5 * 5 * SECONDS


def test_what_cannot_be_measured_is_told():
    with pytest.raises(ModelError, match="resolution 100 is not divisible by"):
        measured(resolution=100)
    with pytest.raises(
        ModelError, match="text_encoder: none of num_hidden_layers, num_layers is in the config of this X"
    ):
        whole.text_seconds(TextEncoder("text_encoder", "X", {"width": 3}, 77), 1, torch.float32)
