"""`davae inspect` shows and writes the phases of an upgrade."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from davae.cli import app
from davae.latent import LatentLayout
from davae.plan import phases
from davae.plan.inspect import Inspection, inspected_phases, step_of
from davae.pretrained.shapes import read_shapes
from davae.zoo import resolve

GIB = 2**30
PHASES = ["stage1", "cache", "stage2", "export", "report", "sampling"]
NAMES = ("weights", "gradients", "optimizer", "ema", "activations", "peak")


def inspection() -> Inspection:
    shapes = read_shapes(resolve("micro"))
    figures: dict[str, float] = {"resolution": 128, "scale": 2, "bound": 1.7}
    for prefix, size in (("stage1", 1), ("stage2_lora", 3), ("stage2_lora_checkpointed", 2)):
        figures |= {f"{prefix}_{name}_bytes": size * GIB for name in NAMES}
    figures |= {f"upgraded_vae_{way}_flops": 1e9 for way in ("encode", "decode")}
    figures |= {"upgraded_flops": 1e9, "native_flops": 2e9, "trained_parameters_lora256": 1e6}
    figures |= {f"{part}_parameters": 1e6 for part in ("transformer", "vae", "detail_vae", "text_encoder")}
    figures |= {"latent_side": 16, "passes_per_step": 2}
    for name in ("native", "upgraded"):
        figures |= {f"{name}_sampling_{kind}_bytes": GIB for kind in ("decode", "transformer")}
    return Inspection("micro", shapes, LatentLayout(shapes.channels, 8), figures, [])


def test_the_steps_are_those_of_the_inspection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("davae.plan.phases.rehearsed", lambda *_: GIB)
    found = inspected_phases(inspection())
    assert found is not None
    sizes = {phase.name: phase.device / GIB for phase in found.phases}
    assert list(sizes) == PHASES
    assert sizes["stage1"] == pytest.approx(4, abs=0.1)
    assert sizes["stage2"] == pytest.approx(8, abs=0.1), "with gradient checkpointing"
    assert step_of(inspection(), "stage2_lora", 5.0).activations == 3 * GIB


def test_a_model_that_cannot_be_trained_has_no_phases():
    found = inspection()
    del found.figures["bound"]
    assert inspected_phases(found) is None


def test_sampling_is_not_rehearsed_twice(monkeypatch: pytest.MonkeyPatch):
    """Its memory is the inspection's; encoding alone is new."""
    asked: list[str] = []

    def rehearsed(work: Callable[[], int], *request: Any) -> int:
        if repr(request) not in phases._REHEARSED:
            asked.append(request[0])
        return 2 * GIB

    monkeypatch.setattr(phases, "_REHEARSED", {})
    monkeypatch.setattr(phases, "rehearsed", rehearsed)
    assert inspected_phases(inspection()) is not None
    assert set(asked) == {"encode"}


def test_inspect_writes_and_prints_the_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(phases, "rehearsed", lambda *_: GIB)
    monkeypatch.setattr("davae.plan.inspect.inspect_model", lambda *_, **__: inspection())
    monkeypatch.setattr(sys.modules["davae.commands.inspect"], "_show", lambda _: None)
    file = tmp_path / "found.json"
    shown = CliRunner().invoke(app, ["inspect", "micro", "--resolution", "192", "--json", str(file)])
    assert shown.exit_code == 0, shown.output
    values = json.loads(file.read_text())
    assert [phase["name"] for phase in values["phases"]] == PHASES
    assert set(values["phases"][0]) >= {"device_gib", "host_gib", "disk_gib", "hours", "fits"}
    assert values["gpu"] == "h100-80gb"
    assert values["transformer_parameters"] == 1e6, "the figures of before stay"
    assert all(name in shown.output for name in PHASES)
