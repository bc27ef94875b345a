"""Releases: one version everywhere, a changelog, lower bounds that can be installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import davae

ROOT = Path(__file__).parents[2]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "src/davae").mkdir(parents=True)
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "src/davae/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_all_files_name_one_version(copy: Path):
    problems = script("release").problems
    wrong = problems(davae.__version__, copy)
    assert all(line.startswith("CHANGELOG.md") for line in wrong), "versions agree"
    changes = copy / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("## Unreleased", f"## {davae.__version__} (2026-11-28)"))
    assert problems(davae.__version__, copy) == []
    assert [line.partition(":")[0] for line in problems("9.9.9", copy)] == [
        "pyproject.toml", "src/davae/__init__.py", "CITATION.cff", "CHANGELOG.md",
    ]  # fmt: skip


def test_every_requirement_has_a_lower_bound_that_this_environment_meets():
    pinned = [Requirement(text) for text in script("oldest").oldest()]
    assert len(pinned) > 25
    for requirement in pinned:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="]
    free = script("oldest").oldest(newest=["torch"])
    assert [text for text in free if "==" not in text] == [text for text in free if text.startswith("torch>=")]
    for name in script("oldest").CORE:
        assert (ROOT / "tests" / name).is_file()


def test_the_citation_is_valid_yaml():
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= values.keys()
    assert "2603.22125" in values["preferred-citation"]["url"]
