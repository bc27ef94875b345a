"""A short, seeded slice of benchmarks/fuzz.py: damaged files are read or refused, nothing else."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

pytest.importorskip("davae.publish.assemble")  # imported before the clock of the first input runs
pytest.importorskip("davae.convert.checkpoints")

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("fuzz_bench", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "door",
    ["images", "shards", "recipes", "upgrade files", "prompt files", "arrays", "checkpoints", "captions and JSON"],
)
def test_damaged_files_are_read_or_refused(bench, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "SECONDS", 20.0)  # the suite shares its cores
    before = signal.signal(signal.SIGALRM, bench._alarm)
    try:
        files = bench.DOORS[door][0]()
        faults = {seed: bench.attempt(door, files, seed, tmp_path) for seed in range(8)}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not {seed: fault for seed, fault in faults.items() if fault}


def test_a_fault_is_seen(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness tells other exceptions, hangs and stray files from a refusal."""

    def raises(folder: Path) -> None:
        raise TypeError("x")

    def hangs(folder: Path) -> None:
        while True:
            pass

    before = signal.signal(signal.SIGALRM, bench._alarm)
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    try:
        for read, message in (
            (raises, "TypeError"),
            (hangs, "more than"),
            (lambda folder: (folder / "../../stray").write_text("x"), "outside its folder"),
        ):
            monkeypatch.setitem(bench.DOORS, "x", (dict, read))
            assert message in bench.attempt("x", {"a": b"abc"}, 0, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
