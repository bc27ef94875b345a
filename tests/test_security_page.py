"""The security page: its table names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_of_the_threat_table_exists():
    named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 15
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "guard" not in line and "tests/" in line]
    assert all(re.search(r"`tests/test_\w+\.py::test_\w+` \|$", row) for row in rows)
    missing = []
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{name}")
    assert not missing


def test_who_reports_a_fault_finds_how():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for part in ("How to report", "What davae promises", "What davae does not promise"):
        assert f"## {part}" in text
    assert "security.md" in text
