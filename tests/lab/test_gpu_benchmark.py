"""benchmarks/gpu.py: the order and time of its parts, what a part that fails leaves, and, slowly, each part at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_the_parts_fit_into_eight_minutes(gpu: Any):
    assert sum(part.seconds for part in gpu.PARTS) <= gpu.BUDGET <= 480
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
    assert "picture" in gpu.PARTS[0].name, "what is worth most comes first"


def test_each_part_is_written_and_takes_no_other_with_it(gpu: Any, tmp_path: Path):
    scripts = {
        "good": "import json; print('a line of a library'); print(json.dumps({'speedup': 2.0}))",
        "bad": "raise RuntimeError('out of memory')",
        "silent": "import sys; sys.exit(3)",
        "slow": "import time; time.sleep(60)",
        "last": "print('{}')",
    }
    parts = tuple(gpu.Part(name, 1.0 if name == "slow" else 20.0, lambda tiny: {}) for name in scripts)
    out, seen = tmp_path / "new" / "gpu.json", []

    def command(part: Any) -> list[str]:
        seen.append(list(json.loads(out.read_text())["parts"]) if out.exists() else [])
        return [sys.executable, "-c", scripts[part.name]]

    found = gpu.run(parts, command, out, 60.0, {"tiny": True})
    assert json.loads(out.read_text()) == found
    assert seen == [list(scripts)[:number] for number in range(len(scripts))], "written as it goes"
    assert found["parts"]["good"]["speedup"] == 2.0
    assert found["parts"]["bad"] == {"error": "RuntimeError: out of memory"}
    assert found["parts"]["silent"] == {"error": "exit status 3"}
    assert found["parts"]["slow"] == {"error": "stopped after 1 seconds"}
    assert "error" not in found["parts"]["last"]
    assert gpu.run(parts, command, out, 0.0, {})["parts"]["good"] == {"error": "no time was left"}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path):
    subprocess.run([sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path / "gpu.json")], check=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all("error" not in figures for figures in parts.values())
    assert all(parts[f"text model, {precision}"]["finite"] for precision in ("bf16", "fp16"))
