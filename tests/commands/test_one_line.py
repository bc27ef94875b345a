"""Files that the system refuses, and memory that it does not have, are one line of any verb and exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from davae import cli
from davae.convert.lora import convert_lora
from davae.convert.tiny import tiny_autoencoder
from davae.data.latent_cache.import_shards import read_statistics
from davae.errors import DataError, ModelError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b.json"), "davae: a/b.json: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "a"), "davae: a: Is a directory\n"),
        (OSError("no\ndetails"), "davae: no details\n"),
        (MemoryError(), "davae: out of memory; use a smaller model, resolution or batch\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "davae: out of memory; use a smaller model, resolution or batch\n",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            "davae: out of memory; use a smaller model, resolution or batch\n",
        ),
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


class Failing(torch.utils.data.Dataset):
    """Fails in the process that reads it."""

    def __init__(self, error: Exception, first: Exception | None = None):
        self.error, self.first = error, first

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error from self.first


@pytest.mark.parametrize(
    ("error", "first", "line"),
    [
        (DataError("set: no image\nis left: try others"), None, "set: no image is left: try others"),
        (OSError(5, "Input/output error", "a/b.tar"), None, "[Errno 5] Input/output error: 'a/b.tar'"),
        (DataError("set: cut off"), KeyError("offset"), "set: cut off"),
        (PermissionError("closed"), None, "closed"),
    ],
)
def test_what_a_worker_of_a_data_loader_raises_is_its_own_line(
    error: Exception,
    first: Exception | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "app", lambda: list(torch.utils.data.DataLoader(Failing(error, first), num_workers=1)))
    monkeypatch.setattr(sys, "argv", ["davae", "recipes"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"davae: {line}\n"


def test_messages_without_a_worker_stay_whole() -> None:
    begin = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    assert cli.own_words(f"{begin}  File x\n    y\ndavae.errors.DataError\n") == "davae.errors.DataError"
    assert cli.own_words(f"{begin}  File x\nOSError: a.tar: b\n") == "a.tar: b"
    for message in ("Caught a cold: b", "a.tar: b", begin, ""):
        assert cli.own_words(message) == message


@pytest.mark.parametrize("kind", [TypeError, RuntimeError])
def test_a_fault_of_davae_stays_a_traceback(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise kind("a bug")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["davae", "recipes"])
    with pytest.raises(kind, match="a bug"):
        cli.main()


def test_files_of_another_kind_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, file)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match="no plain tensors named mean and std"):
        read_statistics(tmp_path / "cut.safetensors", 2)
    for weights in ({"x": torch.ones(2)}, {}, {"1.bias": torch.ones(2)}):
        with pytest.raises(ModelError, match="does not fit a tiny autoencoder"):
            tiny_autoencoder(weights, {"0.weight": torch.ones(1)})
    (tmp_path / "model").mkdir()
    for index in ("{}", '{"_class_name": "X"}', '{"_class_name": "FluxPipeline", "transformer": ["diffusers"]}'):
        (tmp_path / "model" / "model_index.json").write_text(index)
        with pytest.raises(ModelError):
            convert_lora(file, str(tmp_path / "model"), tmp_path / "out.safetensors")
