"""The security page: its table names tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_of_the_threat_table_exists():
    named = re.findall(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 15
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "guard" not in line and "tests/" in line]
    assert all(re.search(r"`tests/\w+/test_\w+\.py::test_\w+` \|$", row) for row in rows)
    missing = []
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{name}")
    assert not missing


def test_the_tables_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("make_security_tables", ROOT / "docs" / "make_security_tables.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.START in PAGE
    assert maker.page_with_tables(PAGE) == PAGE, "run: python docs/make_security_tables.py"
    found = {
        "command": "python x.py",
        "total": {"a": 1},
        "kinds": {"b": {"tries": 1200, "note": "x"}, "c": {"lost": 3}},
    }
    monkeypatch.setattr(maker, "RESULTS", tmp_path)
    (tmp_path / "fuzz.json").write_text(json.dumps(found))
    changed = maker.page_with_tables(PAGE)
    assert "| b | 1,200 | 0 |\n| c | 0 | 3 |\n| together | 1,200 | 3 |" in changed
    assert "`python x.py`" in changed


def test_who_reports_a_fault_finds_how():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for part in ("How to report", "What davae promises", "What davae does not promise"):
        assert f"## {part}" in text
    assert "security.md" in text
