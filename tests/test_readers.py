"""Files of every kind become the right images, captions and classes; what is not used is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from davae.data.openmoji import OpenMoji
from davae.data.sources import open_source


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_captions_are_known_without_pixels(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.data.openmoji.main_colour", lambda rgba: "red")
    source = OpenMoji.__new__(OpenMoji)
    source.entries = [type("E", (), {"codepoints": "1", "name": "rose", "colour": ""})()]
    source.pixels, source._colours = np.zeros((1, 4, 4, 4), np.uint8), {}
    draw = lambda: None if seed is None else np.random.default_rng(seed)  # noqa: E731
    assert source.caption(0, draw()) == source.load(0, draw())[1]


def test_findings_name_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "x.png")
    found = open_source(str(tmp_path), 8)
    assert (found.findings.layout, found.findings.class_names) == ("class folders", ("cat", "dog"))
    assert found.caption(1) == "dog"
