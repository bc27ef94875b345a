"""Damaged files of a run folder, as a disk, an editor or a stranger leaves them: one line, or made again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_stopping import tiny_recipe

import davae
from davae.analyze.curves import stage2_records
from davae.app import slot
from davae.commands.verbs import check_value
from davae.data.latent_cache.meta import read_meta
from davae.data.sizes import load_sizes
from davae.errors import DataError, ModelError, RecipeError, RunError
from davae.evaluate.geneval import judge_folder
from davae.files.checksums import check_folder
from davae.files.outputs import check_figures
from davae.files.ownership import check_out, unowned
from davae.files.reading import load_json, parse_json, whole_number
from davae.publish.export import _report
from davae.publish.report_file import read_report
from davae.runs.report import has_report
from davae.train.locking import PROCESS, running_process
from davae.train.run_folder import Best, RunFolder, load_checkpoint, read_metrics, save_checkpoint
from davae.train.times import read_times

SOURCE = Path(davae.__file__).parent
DEEP = "[" * 100_000
DAMAGED = (
    b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b"null", b"5", b'"x"', b"[[1]]", DEEP.encode(), b'{"a": ' * 50_000,
    b"1e999", b"9" * 5000, b'{"pid": Infinity, "host": "x", "step": 1e999, "name": 1, "batch_size": true}',
)  # fmt: skip


def test_json_is_read_in_one_place():
    """`json.loads` raises RecursionError, which is no ValueError, for text that is nested too deeply."""
    allowed = {
        "files/reading.py": 1,
        "app/limits.py": 1,
        "app/decoding.py": 1,
        "tasks/text_to_image.py": 1,
    }  # of davae's own making
    found = {}
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if count := len(re.findall(r"json\.loads?\((?!json\.dumps)", text)):
            found[file.relative_to(SOURCE).as_posix()] = count
    assert found == allowed
    for text in (DEEP, '{"a": ' * 50_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            load_json(text)
        with pytest.raises(ModelError, match="nested too deeply"):
            parse_json(text, "x")
    for value in (True, 1.0, "1", None, float("inf"), [1]):
        with pytest.raises(ValueError, match="whole number"):
            whole_number(value)


def test_links_that_lead_in_a_circle_are_no_crash(tmp_path: Path):
    """`Path.resolve` raises RuntimeError there."""
    users = {
        f.name for f in SOURCE.rglob("*.py") if re.search(r"(?<!__\))\.resolve\(", f.read_text(encoding="utf-8"))
    }
    assert users <= {"limits.py"}  # which catches it
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    check_out(tmp_path / "a")
    with pytest.raises(RunError, match="cannot write"), davae.files.atomic.atomic_folder(tmp_path / "a"):
        pass
    from davae.app.roots import Roots

    assert Roots(tmp_path, tmp_path, "micro").data_names()[1:] == []
    assert "a" not in Roots(tmp_path, tmp_path, "micro").model_names()


def test_names_that_are_not_unicode_are_one_line():
    for value in ("a\udcff", Path("a\udcff")):
        with pytest.raises(RecipeError, match=r"--out: .* is not UTF-8 text"):
            check_value("out", "--out", value)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_small_files_of_any_content(tmp_path: Path, content: bytes):
    """Each is as good as absent, or refused in one line."""
    for name in (
        "report.json",
        "metrics.jsonl",
        "times.json",
        PROCESS,
        slot.FILE,
        "checksums.json",
        ".davae.json",
        "meta.json",
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "one-best.json").write_bytes(content)
    assert running_process(tmp_path) is None
    assert slot.holder(tmp_path) is None
    with slot.taken(tmp_path, "x") as held:
        held.seek(0)
        held.truncate()
        held.write(content.decode("latin-1"))
        held.flush()
        assert slot.holder(tmp_path) == slot.Holder("", 0)
    assert Best(tmp_path, "one").kept() == -1
    assert read_times(tmp_path) == {}
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert unowned(tmp_path)
    assert not has_report(tmp_path)  # the report is made again
    if content != b"{}":
        with pytest.raises(ModelError):
            _report(tmp_path, SimpleNamespace())  # type: ignore[arg-type]
    for kind, read in (
        (ModelError, lambda: check_folder(tmp_path)),
        (DataError, lambda: read_meta(tmp_path)),
        (ModelError, lambda: stage2_records(tmp_path)),
    ):
        with pytest.raises(kind):
            read()
    if content.strip():
        with pytest.raises(RunError, match="is not a file of figures"):
            check_figures(tmp_path / "report.json")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ModelError):
        judge_folder(tmp_path, lambda _: [], SimpleNamespace())  # type: ignore[arg-type]


def test_a_mark_of_wrong_types_marks_nothing(tmp_path: Path):
    for mark in (
        {"files": [["a"]]},
        {"files": {"a": 1}},
        {"files": ["a"], "texts": 5},
        {"files": ["a"], "texts": ["a"]},
    ):
        (tmp_path / ".davae.json").write_text(json.dumps(mark))
        (tmp_path / "a").touch()
        assert unowned(tmp_path) is not None
    for sums in ({"crc32": ["x"]}, {"crc32": {"x": "y"}}, {"crc32": "x"}, {"crc32": {"x": None}}):
        (tmp_path / "checksums.json").write_text(json.dumps(sums))
        (tmp_path / "x").touch()
        with pytest.raises(ModelError, match=r"checksums\.json is damaged"):
            check_folder(tmp_path)


REPORT = {
    "facts": {"machine": "x"},
    "speed": [{"name": "a", "tokens": 1, "transformer_seconds": 1.0, "whole_seconds": 1, "speedup_over_native": 1.0}],
    "reconstruction": [{"name": "full", "psnr": 1.0, "ssim": 0.5, "lite0": 0.1}],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"facts": []}, {"facts": {}}, {"facts": {"machine": 5}}, {"speed": {}}, {"speed": [1]}, {"speed": [{"name": "a"}]},
        {"speed": [{**REPORT["speed"][0], "tokens": None}]}, {"speed": [{**REPORT["speed"][0], "speedup_over_native": "1"}]},
        {"reconstruction": None}, {"reconstruction": [{**REPORT["reconstruction"][0], "psnr": "1"}]},
        {"reconstruction": [{**REPORT["reconstruction"][0], "name": None}]},
    ],
)  # fmt: skip
def test_a_report_without_its_figures_is_one_line(tmp_path: Path, change: dict):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert read_report(tmp_path) == REPORT
    assert has_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
    with pytest.raises(ModelError, match=r"report.json is damaged.*delete it"):
        read_report(tmp_path)
    assert not has_report(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"stage": "stage2", "step": 1, "loss_base": "1"}, {"stage": "stage2", "step": True, "loss_base": 1.0},
        {"stage": "stage2", "step": 1, "loss_base": None}, {"stage": "stage2", "step": 1, "loss_base": 10**400},
        {"stage": "stage2", "step": 1, "loss_base": [1]}, ["stage", "step"],
    ],
)  # fmt: skip
def test_metrics_of_wrong_types_are_dropped(tmp_path: Path, record: object):
    good = {"stage": "stage2", "step": 2, "loss_base": float("nan"), "loss_detail": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(value) + "\n" for value in (record, good)))
    assert [found["step"] for found in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    with pytest.raises(ModelError, match="has logged no two steps"):
        stage2_records(tmp_path)


def test_swapped_checkpoints_are_noticed(tmp_path: Path):
    """The content of another stage or step under a checkpoint's name, whole and with its own checksum."""
    folder = RunFolder(tmp_path, tiny_recipe())
    for stage, step in (("stage1", 2), ("stage1", 4), ("stage2", 4)):
        save_checkpoint(folder, stage, step, {"x": torch.zeros(1)}, 9, lambda _: False)
    places = tmp_path / "checkpoints"
    (places / "stage1-00000004").rename(places / "earlier-stage1-00000004")
    load_checkpoint(places / "earlier-stage1-00000004")  # davae's own renaming
    for found in ("earlier-stage1-00000004", "stage2-00000004"):
        (places / found).rename(places / "kept")
        (places / "stage1-00000002").rename(places / found.removeprefix("earlier-"))
        with pytest.raises(RunError, match="cannot be read: it holds step 2 of stage1"):
            load_checkpoint(places / found.removeprefix("earlier-"))
        (places / found.removeprefix("earlier-")).rename(places / "stage1-00000002")
        (places / "kept").rename(places / found)
    for name in ("stage1-00000002 (copy)", "stage1-3x"):
        (places / name).mkdir()
    (places / "stage1-00000009").touch()
    assert [path.name for path in folder.checkpoints("stage1")] == ["stage1-00000002"]
    folder.close()


def test_sizes_of_another_shape_are_measured_again(tmp_path: Path):
    import numpy as np

    for reasons in (b"[]", b'{"x": "y"}', b"5", DEEP.encode(), b"\xff"):
        np.savez(tmp_path / "survey-k.npz", pixels=np.ones((2, 2)), reasons=np.frombuffer(reasons, np.uint8))
        assert load_sizes(tmp_path, "k", 2) is None
    assert os.listdir(tmp_path) == ["survey-k.npz"]


def test_a_shard_with_negative_sizes_is_not_whole(tmp_path: Path):
    """Base-256 sizes of a tar have a sign, and Python's tarfile takes it."""
    import tarfile

    from davae.data.shards.tar_index import read_index

    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    content = bytearray((tmp_path / "x.tar").read_bytes())
    for size in (b"\xff" * 12, b"\xff" + b"\0" * 11):
        content[124:136], content[148:156] = size, b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        (tmp_path / "x.tar").write_bytes(bytes(content))
        with pytest.raises(DataError, match="is not a whole tar file"):
            read_index(tmp_path / "x.tar")


def test_pipes_for_shards_and_endless_class_numbers_are_one_line(tmp_path: Path):
    from davae.data.captions.texts import UnreadableCaption, as_label
    from davae.data.options import SourceOptions
    from davae.data.sources import open_source

    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match="is not a regular file"):  # it was waited for without end
        open_source(str(tmp_path / "x.tar"), 8, SourceOptions())
    assert as_label(2**31 - 1, "a") == 2**31 - 1
    for value in (2**31, "9" * 24, 1e300):
        with pytest.raises(UnreadableCaption, match="no whole number from 0 on, below"):
            as_label(value, "a.cls")
