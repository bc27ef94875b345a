"""The examples run as written: `make slow`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WRITES = {
    "three_ways.py": "three_ways.png",
    "fade_detail.py": "fade_detail.png",
    "upgrade_in_code.py": "upgrade_in_code/rose.png",
}

pytestmark = pytest.mark.slow


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(WRITES)


@pytest.mark.parametrize("script", WRITES)
def test_scripts(script: str, tmp_path: Path):
    subprocess.run([sys.executable, EXAMPLES / script, tmp_path], check=True, cwd=tmp_path)
    with Image.open(tmp_path / WRITES[script]) as picture:
        assert picture.convert("L").getextrema()[0] < 250  # something was drawn
        assert min(picture.size) >= 128


def test_notebook(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks run with nbclient and ipykernel (davae[dev])")
    client = pytest.importorskip("nbclient", reason="notebooks run with nbclient and ipykernel (davae[dev])")
    notebook = nbformat.read(EXAMPLES / "micro.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
