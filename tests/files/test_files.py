"""Files and folders appear whole or not at all, whoever writes them, and a full disk is one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder, tiny_recipe
from PIL import Image

from davae.errors import DataError, DavaeError, ModelError, RecipeError, RunError, UnreadableImage
from davae.files import atomic as files
from davae.files.atomic import (
    atomic_file,
    atomic_folder,
    atomic_text,
    make_folder,
    require_space,
    save_tensors,
    saving,
)
from davae.files.ownership import MARK
from davae.tasks.text_to_image import build_text_encoder, build_tokenizer

WRITERS = 30


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_errors_are_of_one_kind_and_keep_their_bases():
    from davae.errors import DataError as of_data
    from davae.errors import ModelError as of_models
    from davae.errors import RecipeError as of_recipes
    from davae.errors import RunError as of_runs

    assert (of_data, of_models, of_recipes, of_runs) == (DataError, ModelError, RecipeError, RunError)
    assert issubclass(DataError, ValueError)
    assert issubclass(RecipeError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert isinstance(UnreadableImage("truncated", "12 bytes"), DavaeError)


@pytest.mark.parametrize("folder", [False, True])
def test_many_writers_of_one_name_lose_nothing(tmp_path: Path, folder: bool):
    target = tmp_path / "made" / "x"

    def write(number: int) -> None:
        if not folder:
            return atomic_text(target, str(number) * 1000)
        with atomic_folder(target) as partial:
            for name in "abc":
                (partial / name).write_text(str(number))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    assert names(target.parent) == ["x"]
    if folder:
        assert len({(target / name).read_text() for name in "abc"}) == 1
    else:
        assert len(target.read_text()) in (1000, 2000)


def test_processes_write_one_folder_at_once(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from davae.files.atomic import atomic_folder\n"
        "for i in range(20):\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'x') as p: (p / 'a').write_text('1'); (p / 'b').write_text('1')"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == [MARK, "a", "b"]


def test_what_a_killed_process_left_goes_and_what_it_moved_aside_comes_back(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine, theirs = f"{files.machine_id()}-{child.pid}-00000000", "ffffffff-1-00000000"
    (tmp_path / f".kept.{mine}.replaced").mkdir()
    (tmp_path / f".there.{mine}.replaced").mkdir()
    (tmp_path / f".half.safetensors.{mine}.partial.safetensors").write_bytes(b"half")
    (tmp_path / f".other.{theirs}.partial").write_bytes(b"another machine writes it")
    (tmp_path / f".busy.{files.machine_id()}-{os.getpid()}-00000000.partial").write_bytes(b"this process writes it")
    for own in (".x.old", ".y.partial", "notes.partial"):  # names of the user's files
        (tmp_path / own).write_text("mine")
    (tmp_path / "there").mkdir()
    with atomic_folder(tmp_path / "new"):
        pass
    left = names(tmp_path)
    assert {"kept", "there", "new", ".x.old", ".y.partial", "notes.partial", f".other.{theirs}.partial"} < set(left)
    assert len(left) == 8


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("pipeline", "dangling"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    for number in range(3):
        for name in ("pipeline", "dangling"):
            with atomic_folder(tmp_path / "run" / name) as partial:
                (partial / "x").write_text(str(number))
    assert (tmp_path / "run" / "pipeline").is_symlink()
    assert (tmp_path / "disk" / "pipeline" / "x").read_text() == "2"
    assert names(tmp_path / "disk") == ["dangling", "pipeline"]
    assert names(tmp_path / "run") == ["dangling", "pipeline"]
    (tmp_path / "run" / "cache").symlink_to(tmp_path / "elsewhere" / "cache")
    make_folder(tmp_path / "run" / "cache")
    assert (tmp_path / "elsewhere" / "cache").is_dir()


def test_a_file_where_a_folder_is_to_be_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "x").write_text("mine")
    for _ in range(2):
        with pytest.raises(RunError, match="x is a file"), atomic_folder(tmp_path / "x"):
            pass
        with pytest.raises(RunError, match="x is a file"), atomic_folder(tmp_path / "x" / "y"):
            pass
    assert (tmp_path / "x").read_text() == "mine"
    assert names(tmp_path) == ["x"]


ARCHITECTURE = tiny_recipe().architecture
TOKENIZER = build_tokenizer(["a red square"], 600, 8)
NOISE = np.random.default_rng(0).integers(0, 255, (1 << 18,), np.uint8)
FILLERS = {
    "text": lambda path: path.write_bytes(NOISE.tobytes()),
    "numpy": lambda path: np.save(path.with_suffix(".npy"), NOISE),
    "torch": lambda path: torch.save(torch.from_numpy(NOISE), path),
    "image": lambda path: Image.fromarray(NOISE.reshape(512, 512)).save(path, format="PNG"),
    "diffusers": lambda path: tiny_autoencoder().save_pretrained(path),
    "tokenizers": lambda path: TOKENIZER.save_pretrained(path),
    "transformers": lambda path: build_text_encoder(ARCHITECTURE, TOKENIZER).save_pretrained(path),
    "safetensors": lambda path: save_tensors(path, {"x": torch.from_numpy(NOISE)}),
}


@pytest.mark.parametrize("kind", FILLERS)
def test_a_full_disk_is_one_line_for_every_writer(tmp_path: Path, kind: str):
    """A limit on file sizes gives the same errors as a full disk, to the child alone."""
    import resource

    child = os.fork()
    if not child:
        code = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
        try:
            with atomic_folder(tmp_path / "x") as partial:
                FILLERS[kind](partial / "y")
        except RunError as error:
            line = str(error)
            code = 0 if line.startswith("cannot write") and "free space" in line and "whole" in line else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_errors_of_the_disk_name_what_survives(number: int):
    line, kept = (
        f"cannot write x: {os.strerror(number)}; the last checkpoint is whole",
        "the last checkpoint is whole",
    )
    with pytest.raises(RunError, match=line), saving(Path("x"), kept):
        raise OSError(number, os.strerror(number))
    for words in ("problem writing element 16384 to file", "1048576 requested and 524256 written"):  # numpy's
        with pytest.raises(RunError, match="No space left on device"), saving(Path("x")):
            raise OSError(words)
    with pytest.raises(RunError, match="No space left on device"), saving(Path("x")):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does
    with pytest.raises(FileNotFoundError), saving(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "what is read is another matter")
    with pytest.raises(RuntimeError, match="shapes"), saving(Path("x")):
        raise RuntimeError("shapes differ")


def test_folders_that_cannot_be_renamed_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match="this file system cannot rename folders"), atomic_folder(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


def test_space_is_asked_for_before(tmp_path: Path):
    require_space(tmp_path / "a" / "b", 1 << 10, "the cache")
    with pytest.raises(RunError, match=r"the cache needs 4194304.00 GiB, the disk has .* GiB left"):
        require_space(tmp_path / "a" / "b", 1 << 52, "the cache")


def test_files_and_folders_are_synced_before_and_after_they_take_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "to_disk", lambda path: synced.append((path.name, (tmp_path / "x").exists())))
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("1")
    assert [(name == tmp_path.name, there) for name, there in synced] == [(False, False), (True, True)]


def test_a_lone_surrogate_does_not_stop_a_writer(tmp_path: Path):
    import json

    atomic_text(tmp_path / "x.json", json.dumps({"name": os.fsdecode(b"caf\xe9.png")}, ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_text()) == {"name": "caf\udce9.png"}
    with atomic_file(tmp_path / f"{'long' * 60}.json") as partial:
        partial.write_text("{}")
