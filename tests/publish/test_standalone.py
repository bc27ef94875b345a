"""Classes of davae that pipelines hold, each as one module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import davae
from davae.publish.standalone import standalone_source

OWN = [name for name in davae.__all__ if hasattr(getattr(davae, name), "from_pretrained")]


@pytest.mark.parametrize("name", OWN)
def test_every_class_fits_into_one_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = standalone_source(name)
    assert not re.search(r"^\s*(import|from) davae", source, flags=re.MULTILINE)
    (tmp_path / f"alone_{name.lower()}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    alone = getattr(importlib.import_module(f"alone_{name.lower()}"), name)
    assert {member for member in vars(getattr(davae, name)) if not member.startswith("__")} <= set(vars(alone))
