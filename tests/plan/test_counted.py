"""Figures of `davae inspect` that were counted before are read, not counted again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from davae.plan import counted as module
from davae.plan.counted import SHIPPED, config_fingerprint, inspected_figures, picture_figures, request_key


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is counted, in order; nothing ships and nothing is kept yet."""
    asked: list[Any] = []

    def count(
        model: str, resolution: int | None, scale: int, detail: int | None, steps: int | None, watch: Any
    ) -> Any:
        asked.append((Path(model).name, resolution, scale, detail))
        figures = {f"{name}_{part}_flops": 10.0 for name in ("native", "upgraded") for part in ("vae_decode",)}
        figures |= {"native_flops": 4.0, "upgraded_flops": 1.0, "text_flops": 1.0, "passes_per_step": 2, "bound": 4.0}
        values = {"model": model, "resolution": resolution or 128, "notes": [], **figures}
        return values | picture_figures(values, steps or 28)

    monkeypatch.setenv(module.PLACE, str(tmp_path / "kept"))
    monkeypatch.setattr(module, "count_figures", count)
    monkeypatch.setattr(module, "_shipped", dict)
    return asked


def folder(place: Path, width: int = 8) -> Path:
    (place / "vae").mkdir(parents=True, exist_ok=True)
    (place / "model_index.json").write_text("{}")
    (place / "vae" / "config.json").write_text(json.dumps({"width": width}))
    return place


@pytest.mark.parametrize("kind", ["preset", "folder"])
def test_a_request_is_counted_once(counts: list[Any], kind: str, tmp_path: Path):
    model = "sdxl" if kind == "preset" else str(folder(tmp_path / "model"))
    first = inspected_figures(model)
    assert inspected_figures(model) == first
    assert inspected_figures(model, 128) == first, "the size that it draws by default"
    assert len(counts) == 1
    for other in ({"resolution": 256}, {"scale": 4}, {"detail_channels": 32}):
        inspected_figures(model, **other)
        inspected_figures(model, **other)
    assert len(counts) == 4


def test_steps_change_the_whole_image_alone(counts: list[Any]):
    usual, short = inspected_figures("sdxl"), inspected_figures("sdxl", steps=3)
    assert len(counts) == 1
    assert (short["native_picture_flops"], short["upgraded_picture_flops"]) == (1 + 6 * 4 + 10, 1 + 6 * 1 + 10)
    assert short["picture_bound"] == 35 / 17
    changed = {key for key in usual if usual[key] != short[key]}
    assert changed == {"steps", "native_picture_flops", "upgraded_picture_flops", "picture_bound"}
    assert picture_figures({"model": "only expands"}, 3) == {"steps": 3}


def test_a_changed_config_is_counted_again(counts: list[Any], tmp_path: Path):
    model = str(folder(tmp_path / "model"))
    inspected_figures(model)
    folder(tmp_path / "model", width=16)
    inspected_figures(model)
    (tmp_path / "model" / "vae" / "weights.safetensors").write_bytes(b"no config")
    inspected_figures(model)
    assert len(counts) == 2
    inspected_figures(str(folder(tmp_path / "FLUX.1-schnell", width=16)))  # a distilled model is known by its name
    assert len(counts) == 3


def test_what_cannot_be_read_or_kept_is_counted(
    counts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    inspected_figures("sdxl")
    for damage in ("{", "[]", '{"model": "sdxl"}'):
        for path in (tmp_path / "kept").rglob("*.json"):
            path.write_text(damage)
        caplog.clear()
        inspected_figures("sdxl")
        assert "is damaged" in caplog.text
    assert len(counts) == 4
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(module.PLACE, str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        inspected_figures("sdxl")
    assert len(counts) == 5


def test_a_hub_id_is_never_kept(counts: list[Any]):
    """Its configs may change, and are not here."""
    assert config_fingerprint("some/model") is None
    inspected_figures("some/model", 256)
    inspected_figures("some/model", 256)
    assert len(counts) == 2


def test_other_code_counts_again(counts: list[Any], monkeypatch: pytest.MonkeyPatch):
    inspected_figures("sdxl")
    monkeypatch.setattr(module, "version", lambda package: "0.0")
    inspected_figures("sdxl")
    assert len(counts) == 2


@pytest.mark.parametrize(("model", "resolution"), [("micro", None), ("micro", 128), ("sd35-medium", 1024)])
def test_known_models_ship_counted(model: str, resolution: int | None):
    """With their present configs; test_inspect holds the embedded model's figures against a new count."""
    configs = config_fingerprint(model)
    assert configs is not None
    values = json.loads(SHIPPED.read_text())[request_key(configs, resolution, 2, None)]
    assert values["model"] == model, "run benchmarks/counts.py"
    assert values["phases"]


def test_figures_that_ship_load_no_torch(tmp_path: Path):
    code = "import sys; from davae.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules, 'torch'"
    words = ["inspect", "sd35-medium", "--resolution", "1024", "--json", str(tmp_path / "f.json")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Phases on 1 x h100-80gb" in done.stdout
    assert "one image a pass, prompt embeddings stored" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "f.json").read_text())["upgraded_tokens"] == 1024
