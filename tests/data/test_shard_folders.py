"""Folders of shards and tables: which files are read, what is counted, and files that are no source."""

from __future__ import annotations

import gzip
import io
import zipfile
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_layouts import captions, counts, image_bytes, lay, tar

from davae.data.options import SourceOptions
from davae.data.sources import open_source
from davae.dataset.look import look_at
from davae.errors import DataError, UnreadableImage
from davae.recipes.sections import Data


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), path)


def row(text: str) -> dict[str, Any]:
    return {"image": {"bytes": image_bytes(), "path": None}, "text": text}


def test_lists_of_addresses_next_to_shards_are_counted(tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", {"0.jpg": "", "0.txt": "a cat"})
    table(tmp_path / "00000.parquet", [{"url": "u", "caption": "a cat"}])
    lay(tmp_path, {"00000_stats.json": "{}", "README.md": "x", "more/1.jpg": "", "._00000.tar": "x"})
    source = open_source(str(tmp_path), 8)
    assert captions(str(tmp_path)) == {"00000.tar/0": "a cat"}
    assert counts(source.findings.unused) == {
        ".parquet": 1,
        ".json": 1,
        ".md": 1,
        "folder next to shards or tables": 1,
        "hidden file": 1,
    }


@pytest.mark.parametrize("below", ["", "00000/"])
def test_lists_of_addresses_next_to_loose_images_are_counted(tmp_path: Path, below: str) -> None:
    table(tmp_path / "00000.parquet", [{"url": "u", "caption": "a cat"}])
    lay(tmp_path, {f"{below}0.jpg": "", f"{below}0.txt": "a cat"})
    assert captions(str(tmp_path)) == {f"{below}0.jpg": "a cat"}
    assert counts(open_source(str(tmp_path), 8).findings.unused)[".parquet"] == 1


def test_a_table_without_the_image_column_alone_names_its_columns(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [{"url": "u", "caption": "a cat"}])
    with pytest.raises(DataError, match=r"data\.image_column 'image' is not in .*; it has url, caption"):
        open_source(str(tmp_path), 8)


def test_shards_and_tables_with_images_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.jpg": ""})
    table(tmp_path / "b.parquet", [row("a cat")])
    with pytest.raises(DataError, match=r"shards and tables with images \(b\.parquet\)"):
        open_source(str(tmp_path), 8)


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (("train-0.tar", "val-0.tar"), "train", ["train-0.tar"]),
        (("set-train-0.tar", "set-validation-0.tar", "set-test.tar"), "valid", ["set-validation-0.tar"]),
        (("a.tar", "b.tar"), "train", ["a.tar", "b.tar"]),
        (("val-0.tar", "val-1.tar"), "train", ["val-0.tar", "val-1.tar"]),
        (("train.tar", "test.tar"), "val", "none of val"),
        (("train.tar", "test.tar", "c.tar"), "train", r"several splits, and c\.tar"),
        (("a.tar", "b.tar"), "val", "no files named after splits"),
    ],
)
def test_splits_in_the_names_of_shards(tmp_path: Path, names: tuple[str, ...], split: str, read: list[str] | str):
    for name in names:
        tar(tmp_path / name, {"0.jpg": "", "0.txt": name})
    options = SourceOptions(split=split)
    if isinstance(read, str):
        with pytest.raises(DataError, match=read):
            open_source(str(tmp_path), 8, options)
        return
    source = open_source(str(tmp_path), 8, options)
    assert [source.caption(index) for index in range(len(source))] == read
    assert sum(counts(source.findings.unused).values()) == len(names) - len(read)


def test_splits_in_the_names_of_tables(tmp_path: Path) -> None:
    table(tmp_path / "train-00000-of-00001.parquet", [row("a cat")])
    table(tmp_path / "test-00000-of-00001.parquet", [row("a dog")])
    assert list(captions(str(tmp_path)).values()) == ["a cat"]
    assert list(captions(str(tmp_path), split="test").values()) == ["a dog"]
    assert counts(open_source(str(tmp_path), 8).findings.unused) == {"file of the split test": 1}


def test_a_stream_of_a_folder_keeps_to_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    table(tmp_path / "t" / "test-00000-of-00001.parquet", [row("a dog")])
    table(tmp_path / "t" / "train-00000-of-00001.parquet", [row("a cat")])
    for split, caption in (("train", "a cat"), ("test", "a dog")):
        options = {"split": split, "streaming": True, "limit": 1}
        assert list(captions(str(tmp_path / "t"), **options).values()) == [caption]


def test_a_copy_serves_its_own_project_and_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    options = {"streaming": True, "limit": 1}
    for project in ("one", "two"):
        table(tmp_path / project / "t.parquet", [row(project)])
        tar(tmp_path / project / "a.tar", {"0.jpg": "", "0.txt": project})
        monkeypatch.chdir(tmp_path / project)
        assert list(captions("t.parquet", **options).values()) == [project]
        assert list(captions("pipe:cat a.tar").values()) == [project]
    address = (tmp_path / "two" / "a.tar").as_uri()
    assert list(captions(address).values()) == ["two"]
    table(tmp_path / "two" / "t.parquet", [row("new")])
    tar(tmp_path / "two" / "a.tar", {"0.jpg": "", "0.txt": "new"})
    assert list(captions("t.parquet", **options).values()) == ["new"]
    assert list(captions(address).values()) == ["new"]


@pytest.mark.parametrize(
    ("value", "text"),
    [("a \xe9".encode("latin-1"), "a \xe9"), (Decimal("1.50"), "1.50"), (date(2024, 2, 29), "2024-02-29")],
)
def test_captions_of_columns_that_hold_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, text: str
) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    lay(tmp_path / "images", {"0.jpg": ""})
    table(tmp_path / "images" / "metadata.parquet", [{"file_name": "0.jpg", "text": value}])
    assert list(captions(str(tmp_path / "images")).values()) == [text]
    table(tmp_path / "t.parquet", [{**row(""), "text": value}])
    for options in ({}, {"streaming": True, "limit": 1}):
        assert list(captions(str(tmp_path / "t.parquet"), **options).values()) == [text]


@pytest.mark.parametrize("options", [{}, {"streaming": True, "limit": 4}])
def test_rows_without_a_file_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    cells = [
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        row("")["image"],
    ]
    table(tmp_path / "t.parquet", [{"image": cell, "text": str(n)} for n, cell in enumerate(cells)])
    source = open_source(str(tmp_path / "t.parquet"), 8, SourceOptions(**options))
    for index in range(3):
        with pytest.raises(UnreadableImage, match=r"empty file|missing file"):
            source.load(index)
    assert source.load(3)[0].size == (9, 8)


@pytest.mark.parametrize("cell", [3, [row("")["image"]], {"url": "x"}, {"bytes": 3, "path": "x"}])
def test_a_column_of_another_type_is_named(tmp_path: Path, cell: Any) -> None:
    table(tmp_path / "t.parquet", [{"image": cell, "text": "x"}])
    for options in ({}, {"streaming": True, "limit": 1}):
        with pytest.raises(DataError, match=r"data\.image_column 'image' of .* holds .*; images are binary"):
            open_source(str(tmp_path / "t.parquet"), 8, SourceOptions(**options))


@pytest.mark.parametrize("folder", ["br [1]", "br {1,2}", "a*b"])
def test_a_folder_whose_name_looks_like_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    where = tmp_path / folder
    table(where / "t" / "a.parquet", [row("a cat")])
    tar(where / "s" / "a.tar", {"0.jpg": "", "0.txt": "a dog"})
    for name in ("t/a.parquet", "t/*.parquet", "t"):
        for options in ({}, {"streaming": True, "limit": 1}):
            assert list(captions(str(where / name), **options).values()) == ["a cat"], name
    for name in ("s/a.tar", "s/*.tar", "s/{a,a}.tar", "s"):
        assert list(captions(str(where / name)).values()) == ["a dog"], name


def test_a_split_of_one_table_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table(tmp_path / "a.parquet", [row("a cat")])
    datasets.Dataset.from_parquet(str(tmp_path / "a.parquet")).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "*.parquet", "saved"):
        with pytest.raises(DataError, match=r"data\.split 'val': .* is not divided into splits; leave it out"):
            open_source(str(tmp_path / name), 8, SourceOptions(split="val"))
    table(tmp_path / "val-0.parquet", [row("a cow")])
    assert list(captions(str(tmp_path / "val-0.parquet"), split="val").values()) == ["a cow"]


def test_files_that_are_no_source(tmp_path: Path) -> None:
    lay(tmp_path, {"a.jpg": "", "list.txt": "a.jpg"})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jpg", image_bytes())
    (tmp_path / "a.zip").write_bytes(packed.getvalue())
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name, message in {
        "a.jpg": "one image; give the folder",
        "a.zip": "a zip archive; unpack it",
        "list.txt": "a file that is not a shard",
        "*.jpg": "names 1 files; .* give the folder of images",
        "b.parquet": "cannot be read as a table",
        "c.jpg": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name), 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name is empty"),
        (" ", "the name is empty"),
        ("{" + "x" * 400 + ",b}.tar", "no shard matches"),
        ("./" + "x" * 400, "does not exist"),
    ],
)
def test_names_that_cannot_be_one(name: str, message: str) -> None:
    for opened in (lambda: open_source(name, 8), lambda: look_at(Data(source=name))):
        with pytest.raises(DataError, match=message):
            opened()


def test_a_shard_of_any_name_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("shard", "shard.000"):
        assert captions(tar(tmp_path / name, {"0.jpg": "", "0.txt": "a cat"})) == {f"{name}/0": "a cat"}


def test_packed_files_in_sub_folders_are_read(tmp_path: Path) -> None:
    for name in ("x", "y"):
        tar(tmp_path / name / "0.tar", {"0.jpg": "", "0.txt": name})
    lay(tmp_path, {"x/0_stats.json": "{}", ".cache/0.tar": "x"})
    assert captions(str(tmp_path)) == {"x/0.tar/0": "x", "y/0.tar/0": "y"}
    assert counts(open_source(str(tmp_path), 8).findings.unused) == {".json": 1, "hidden or thumbnail folder": 1}
    table(tmp_path / "t" / "a.parquet", [row("a cat")])
    with pytest.raises(DataError, match=r"shards and tables with images .*/\*\*/\*\.tar or .*/\*\*/\*\.parquet"):
        open_source(str(tmp_path), 8)
    lay(tmp_path, {"1.jpg": ""})
    assert captions(str(tmp_path)) == {"1.jpg": ""}


@pytest.mark.parametrize("names", [("train/a", "test/a"), ("data/train-0", "data/test-0")])
def test_splits_in_the_folders_of_tables(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, text in zip(names, ("a cat", "a dog"), strict=True):
        table(tmp_path / f"{name}.parquet", [row(text)])
    assert list(captions(str(tmp_path)).values()) == ["a cat"]
    assert list(captions(str(tmp_path), split="test").values()) == ["a dog"]
    assert counts(open_source(str(tmp_path), 8).findings.unused) == {"file of the split test": 1}


def test_a_table_that_was_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**row(f"text {n}"), "kind": n} for n in range(3)])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    source = open_source(str(tmp_path / "one"), 8)
    assert [source.load(n)[1] for n in range(3)] == ["text 0", "text 1", "text 2"]
    assert source.key(0) == "one/0"
    assert source.findings.notes == (
        "columns that are not read: kind; data.caption_column and data.label_column name one",
    )
    assert list(captions(str(tmp_path / "two"), split="test").values()) == ["text 1"]
    assert "only the split 'train' is read" in open_source(str(tmp_path / "two"), 8).findings.notes[0]
    with pytest.raises(DataError, match=r"holds train, test but no val; set data\.split"):
        open_source(str(tmp_path / "two"), 8, SourceOptions(split="val"))
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="one cannot be read as a table"):
        open_source(str(tmp_path / "one"), 8)


def test_folders_inside_a_shard(tmp_path: Path) -> None:
    plain = tar(tmp_path / "a", {"im/train/cat/1.png": "", "im/train/dog/2.png": "", "im/val/cat/3.png": ""})
    where = str(tmp_path / "a.tgz")
    Path(where).write_bytes(gzip.compress(Path(plain).read_bytes()))
    source = open_source(where, 8)
    assert [source.key(n) for n in range(len(source))] == ["a.tgz/im/train/cat/1", "a.tgz/im/train/dog/2"]
    assert source.load(1)[0].size == (9, 8)
    assert counts(source.findings.unused) == {"image in val/": 1}
    assert [note.partition(" (")[0] for note in source.findings.notes[1:]] == [
        "only the split 'train' is read; data.split names another",
        "the folders inside the shards",
    ]
    assert list(captions(where, split="val")) == ["a.tgz/im/val/cat/3"]
    flat = tar(tmp_path / "b.tar", {"1.png": "", "2.png": ""})
    assert open_source(flat, 8, SourceOptions(split="val")).findings.notes == ()


def test_a_folder_that_is_called_like_a_shard_is_a_folder(tmp_path: Path) -> None:
    lay(tmp_path, {"a.tar/0.jpg": "", "a.tar/0.txt": "a cat"})
    assert captions(str(tmp_path)) == {"a.tar/0.jpg": "a cat"}
