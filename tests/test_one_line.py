"""Files that the system refuses, and memory that it does not have, are one line of any verb and exit status 2."""

from __future__ import annotations

import sys

import pytest

from davae import cli


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b.json"), "davae: a/b.json: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "a"), "davae: a: Is a directory\n"),
        (OSError("no\ndetails"), "davae: no details\n"),
        (MemoryError(), "davae: out of memory; use a smaller model, resolution or batch\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["davae", "recipes"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == line


def test_a_fault_of_davae_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["davae", "recipes"])
    with pytest.raises(TypeError):
        cli.main()
