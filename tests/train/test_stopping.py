"""Signals, locks and inputs of a run: it stops where all is saved, one at a time, on what it began with."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from test_loop import OneWeight, train

import davae.files.atomic
from davae.errors import Interrupted, RecipeError, RunError
from davae.recipes import dump_recipe
from davae.train.locking import PROCESS, RunLock, changing, hold_for_reading, running_process
from davae.train.monitor import peak_memory_gib
from davae.train.run_folder import (
    Best,
    RunFolder,
    changed_inputs,
    load_checkpoint,
    newest_checkpoint,
    read_metrics,
    save_checkpoint,
    set_aside,
)
from davae.train.signals import check_stop, stop_on_signal

# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_between_stages_is_there_for_the_next(name: str):
    before = signal.getsignal(getattr(signal, name))
    with stop_on_signal([name]):
        with stop_on_signal([name]) as received:
            os.kill(os.getpid(), getattr(signal, name))
        assert received == [getattr(signal, name)]
        with pytest.raises(Interrupted, match="the report: stopped, what is finished is saved"):
            check_stop("the report")
    assert signal.getsignal(getattr(signal, name)) is before
    check_stop("the next run")  # nothing is left of it


def test_a_signal_in_a_stage_s_last_step_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def loss(self: Any, player: str, batch: Any, step: int, draws: object) -> tuple[torch.Tensor, dict]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        value = self.weight.weight.square().sum()
        return value, {"loss": value.detach()}

    monkeypatch.setattr(OneWeight, "loss", loss)
    with pytest.raises(Interrupted, match="one: stopped at step 4 of 4, saved"):
        train(tmp_path, 4, set())
    assert (tmp_path / "checkpoints" / "one-00000004").is_dir()
    monkeypatch.undo()
    train(tmp_path, 4, set())  # goes on after it


def test_a_cache_stops_at_the_next_batch(tmp_path: Path):
    from davae.runs.base import BaseRun

    shown: list[object] = []
    run = BaseRun.__new__(BaseRun)
    run.observer = shown.append
    with stop_on_signal(["SIGUSR1"]):
        run.watch("latents")(1, 9)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="the cache's latents: stopped"):
            run.watch("latents")(2, 9)
    assert len(shown) == 2


@pytest.mark.parametrize("name", ["SIGUSR1"])  # seconds each; SIGTERM takes the same way
def test_a_verb_that_a_signal_ends_leaves_with_130(name: str):
    code = (
        "import davae.cli, sys, time\n"
        "davae.cli._quiet_libraries = lambda: None\n"
        "davae.cli.app = lambda: (print('ready', flush=True), time.sleep(60))\n"
        "sys.argv = ['davae', 'inspect']\n"
        "davae.cli.main()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(getattr(signal, name))
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, b"")


# -- locks -------------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from pathlib import Path; from davae.train.locking import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_a_training_is_found_whoever_started_it_and_gone_after_a_kill(tmp_path: Path):
    assert running_process(tmp_path) is None
    assert running_process(tmp_path / "no folder") is None
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert running_process(tmp_path) == child.pid
    with pytest.raises(RunError, match=rf"in use by another davae process \(process {child.pid}\)"):
        RunLock(tmp_path)
    assert running_process(tmp_path) == child.pid  # asking takes nothing away
    child.kill()
    child.wait()
    assert running_process(tmp_path) is None
    about = json.loads((tmp_path / PROCESS).read_text())
    (tmp_path / PROCESS).write_text(json.dumps({**about, "pid": os.getppid()}))  # its id was given to another process
    assert running_process(tmp_path) is None
    (tmp_path / PROCESS).write_text(json.dumps({**about, "host": "another"}))
    assert running_process(tmp_path) is None
    (tmp_path / PROCESS).write_text("{")
    assert running_process(tmp_path) is None
    lock = RunLock(tmp_path)
    assert running_process(tmp_path) == os.getpid()
    lock.release()
    assert running_process(tmp_path) is None


def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from filelock import FileLock

    def refuse(self: object, *arguments: object, **options: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    RunFolder(tmp_path, tiny_recipe())
    assert "this file system has no locks; never start a run twice at the same time" in caplog.text


def test_neither_sampling_nor_training_needs_modules_that_only_unix_has():
    """A module that Windows lacks may be imported where it is used, with another way beside it."""
    unix = {"fcntl", "resource", "pwd", "grp", "termios"}
    for path in Path(davae.files.atomic.__file__).parent.rglob("*.py"):
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
        names = {alias.name for node in tops for alias in node.names}
        assert not names & unix or path.parent.name in ("bench", "app"), path
    assert peak_memory_gib(torch.device("cpu")) > 0.01


def test_what_others_read_is_not_changed_and_what_is_changed_not_read(tmp_path: Path):
    reading = [hold_for_reading(tmp_path), hold_for_reading(tmp_path)]
    with pytest.raises(RunError, match=r"2 other run\(s\) use its autoencoder and cache"), changing(tmp_path):
        pass
    for lock in reading:
        assert lock is not None
        lock.release()
    with changing(tmp_path), pytest.raises(RunError, match="its stage 1 or cache is being made now"):
        hold_for_reading(tmp_path)
    again = hold_for_reading(tmp_path)
    assert again is not None
    again.release()


def test_a_killed_reader_holds_nothing(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from davae.train.locking import hold_for_reading\n"
        "lock = hold_for_reading(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(RunError, match="1 other run"), changing(tmp_path):
        pass
    child.kill()
    child.wait()
    with changing(tmp_path):
        pass


# -- what a run began with ---------------------------------------------------------------------------------------------


def test_inputs_that_changed_since_a_stage_began_are_named(tmp_path: Path):
    folder = RunFolder(tmp_path, tiny_recipe())
    inputs = {"the autoencoder": "a", "the cache": "b"}
    assert changed_inputs(folder, "stage2", inputs) == []
    assert changed_inputs(folder, "stage2", {**inputs, "the cache": "c"}) == []  # nothing was trained yet
    (tmp_path / "checkpoints" / "stage2-00000001").mkdir()
    assert changed_inputs(folder, "stage2", inputs) == ["the cache"]
    set_aside(folder, "stage2")
    assert folder.checkpoints("stage2") == []
    assert changed_inputs(folder, "stage2", inputs) == []
    assert (tmp_path / "checkpoints" / "earlier-stage2-00000001").is_dir()
    (tmp_path / "checkpoints" / "stage2-00000001").mkdir()
    (tmp_path / "checkpoints" / "stage2-inputs.json").write_text("{")
    assert changed_inputs(folder, "stage2", inputs) == []


def test_a_stage_begins_again_any_number_of_times(tmp_path: Path):
    """Names of earlier and of broken checkpoints may be taken already, by folders with files."""
    folder = RunFolder(tmp_path, tiny_recipe())
    for number in range(3):
        for step in (1, 2):
            save_checkpoint(folder, "stage2", step, {"x": torch.tensor(number)}, 9, lambda _: False)
        (tmp_path / "checkpoints" / "stage2-00000002" / "state.pt").write_bytes(b"cut off")
        state = newest_checkpoint(folder, "stage2")
        assert state is not None
        assert state["x"] == number
        set_aside(folder, "stage2")
        assert folder.checkpoints("stage2") == []
    for number, word in enumerate(("earlier", "earlier-2", "earlier-3")):
        assert load_checkpoint(tmp_path / "checkpoints" / f"{word}-stage2-00000001")["x"] == number
    assert len(list((tmp_path / "checkpoints").glob("broken*-stage2-00000002"))) == 3
    assert (tmp_path / "checkpoints" / "broken-2-stage2-00000002").is_dir()


def test_a_recipe_that_was_edited_in_a_run_folder_is_noticed(tmp_path: Path):
    train(tmp_path, 4, set())
    recipe = tiny_recipe()
    edited = recipe.model_copy(update={"resolution": 32})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(edited))  # by hand: the folder and the command agree
    folder = RunFolder(tmp_path, edited)
    with pytest.raises(
        RunError, match=r"one-00000004 was trained with another recipe: resolution: 16 -> 32; put the"
    ):
        newest_checkpoint(folder, "one")
    folder.close()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    folder = RunFolder(tmp_path, recipe)
    assert newest_checkpoint(folder, "one") is not None
    for path in (tmp_path / "checkpoints").glob("one-*/meta.json"):  # as an earlier version wrote it
        values = json.loads(path.read_text())
        del values["recipe"]
        path.write_text(json.dumps(values))
    assert newest_checkpoint(folder, "one") is not None
    folder.close()


@pytest.mark.parametrize("text", ["", "kind: base\n", "\x00\x01", "[1", "name: tiny\nresolution: x\n"])
def test_a_damaged_recipe_in_a_run_folder_is_one_line(tmp_path: Path, text: str):
    RunFolder(tmp_path, tiny_recipe()).close()
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((RunError, RecipeError), match=r"recipe\.yaml|another recipe"):
        RunFolder(tmp_path, tiny_recipe())


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe{", b"", b"3", b"null", b'{"stage": "one"}', b'{"stage": "one", "step": "2"}', b"[[["]
)
def test_a_damaged_line_of_the_metrics_is_dropped_by_number(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
):
    train(tmp_path, 4, set())
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]) + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert "metrics.jsonl: dropped line 2" in caplog.text
    train(tmp_path, 6, set())
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4, 5, 6]


def test_damaged_small_files_of_a_run_folder_do_not_stop_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    RunFolder(tmp_path, tiny_recipe()).close()
    for text in (b"", b"\xff", b"[]", b'{"step": "x"}'):
        (tmp_path / "checkpoints" / "one-best.json").write_bytes(text)
        assert Best(tmp_path, "one").kept() == -1
    assert "one-best.json is damaged" in caplog.text
    folder = RunFolder(tmp_path, tiny_recipe())
    (tmp_path / "checkpoints" / "vae.done").write_bytes(b"\xff\xfe")
    assert not folder.done("vae")
    folder.close()


def test_a_run_folder_that_is_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(RunError, match=r"out.* is a file"):
            RunFolder(out, tiny_recipe())
    assert (tmp_path / "out").read_text() == "mine"


def test_what_is_logged_is_made_float64_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Apple's devices have no float64: a tensor there that is asked for it fails, as this one does."""

    class OnDevice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cpu:
                with torch._C.DisableTorchFunctionSubclass():
                    return args[0].clone().as_subclass(torch.Tensor)
            found = super().__torch_function__(function, types, args, kwargs or {})
            if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                )
            return found

    def loss(self: Any, player: str, batch: Any, step: int, draws: object) -> tuple[torch.Tensor, dict]:
        value = self.weight.weight.square().sum()
        return value, {"loss": value.detach(), "l1": value.detach().as_subclass(OnDevice)}

    monkeypatch.setattr(OneWeight, "loss", loss)
    train(tmp_path, 2, set())
    assert all(record["l1"] == record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl"))
