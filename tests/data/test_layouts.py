"""Layouts of folders, shards and sample files: the right caption and class for each image, and the rest counted."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from davae.data.captions.texts import MAX_CAPTION, as_label, as_texts, decode_text
from davae.data.findings import Findings
from davae.data.options import SourceOptions
from davae.data.shards.names import expand_braces
from davae.data.sources import open_source
from davae.errors import DataError, UnreadableImage
from davae.recipes import validate


def image_bytes(value: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def lay(folder: Path, files: dict[str, bytes | str]) -> str:
    """Write files below a folder; an image where the content is ''."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            image_bytes() if content == "" else content.encode() if isinstance(content, str) else content
        )
    return str(folder)


def tar(path: Path, files: dict[str, bytes | str] | list[tuple[str, bytes | str]], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            data = image_bytes() if content == "" else content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def captions(name: str, **options: Any) -> dict[str, str]:
    source = open_source(name, 8, SourceOptions(**options))
    return {source.key(i): source.caption(i) for i in range(len(source))}


def labels(name: str, **options: Any) -> dict[str, int | None]:
    source = open_source(name, 8, SourceOptions(**options))
    return {source.key(i): source.label(i) for i in range(len(source))}


def counts(tallies: Any) -> dict[str, int]:
    return {kind: tally.count for kind, tally in tallies.items()}


# -- captions next to images -------------------------------------------------------------------------------------------

SIDECARS: dict[str, tuple[dict[str, bytes | str], str]] = {
    "plain": ({"a.jpg": "", "a.txt": " a cat \n"}, "a cat"),
    "upper case": ({"a.jpg": "", "a.TXT": "a cat"}, "a cat"),
    "mixed case": ({"a.JPG": "", "a.Txt": "a cat"}, "a cat"),
    "stem in another case": ({"IMG_1.JPG": "", "img_1.txt": "a cat"}, "a cat"),
    "accents composed and not": ({"cafe\u0301.jpg": "", "caf\u00e9.txt": "a cat"}, "a cat"),
    "after the ending": ({"a.jpg": "", "a.jpg.txt": "a cat"}, "a cat"),
    "dots": ({"1.image.png": "", "1.caption.txt": "a cat"}, "a cat"),
    "dots and a plain text": ({"1.image.png": "", "1.txt": "a cat"}, "a cat"),
    "dots in the stem": ({"v1.0.png": "", "v1.0.txt": "a cat"}, "a cat"),
    ".caption": ({"a.jpg": "", "a.caption": "a cat"}, "a cat"),
    ".text.txt": ({"a.jpg": "", "a.text.txt": "a cat"}, "a cat"),
    ".prompt": ({"a.jpg": "", "a.Prompt": "a cat"}, "a cat"),
    "json": ({"a.jpg": "", "a.json": '{"url": "x", "caption": "a cat"}'}, "a cat"),
    "json, upper case": ({"a.jpg": "", "a.JSON": '{"prompt": "a cat"}'}, "a cat"),
    "json with a mark": ({"a.jpg": "", "a.json": b'\xef\xbb\xbf{"text": "a cat"}'}, "a cat"),
    "json in UTF-16": ({"a.jpg": "", "a.json": '{"text": "a c\u0101t"}'.encode("utf-16")}, "a c\u0101t"),
    "json list": ({"a.jpg": "", "a.json": '["a cat", "a pet"]'}, "a cat"),
    "json text": ({"a.jpg": "", "a.json": '"a cat"'}, "a cat"),
    "json key with a list": ({"a.jpg": "", "a.json": '{"caption": ["", null, "a cat"]}'}, "a cat"),
    "json, several captions": ({"a.jpg": "", "a.json": '{"captions": ["a cat", "a pet"]}'}, "a cat"),
    "json of LAION": ({"a.jpg": "", "a.json": '{"URL": "u", "TEXT": "a cat"}'}, "a cat"),
    "json number": ({"a.jpg": "", "a.json": '{"caption": 7}'}, "7"),
    "json null": ({"a.jpg": "", "a.json": '{"caption": null}'}, ""),
    "json object": ({"a.jpg": "", "a.json": '{"caption": {"a": 1}}'}, ""),
    "json true": ({"a.jpg": "", "a.json": '{"caption": true}'}, ""),
    "json without caption": ({"a.jpg": "", "a.json": '{"annotations": [[1, 2]]}'}, ""),
    "json list of numbers in lists": ({"a.jpg": "", "a.json": "[[1, 2], [3, 4]]"}, ""),
    "txt before json": ({"a.jpg": "", "a.txt": "a cat", "a.json": '{"caption": "a dog"}'}, "a cat"),
    "empty txt, then json": ({"a.jpg": "", "a.txt": " \n", "a.json": '{"caption": "a cat"}'}, "a cat"),
    "empty": ({"a.jpg": "", "a.txt": b""}, ""),
    "only a mark": ({"a.jpg": "", "a.txt": b"\xef\xbb\xbf"}, ""),
    "two captions": ({"a.jpg": "", "a.txt": "a cat", "a.caption": "a dog"}, "a cat"),
    "line ends": ({"a.jpg": "", "a.txt": b"a cat\r\nat night\rin rain\r\n"}, "a cat\nat night\nin rain"),
    "UTF-8 with a mark": ({"a.jpg": "", "a.txt": b"\xef\xbb\xbfa c\xc4\x81t"}, "a c\u0101t"),
    "UTF-16": ({"a.jpg": "", "a.txt": "a c\u0101t".encode("utf-16")}, "a c\u0101t"),
    "UTF-16, big end first": ({"a.jpg": "", "a.txt": b"\xfe\xff" + "a c\u0101t".encode("utf-16-be")}, "a c\u0101t"),
    "UTF-32": ({"a.jpg": "", "a.txt": "a c\u0101t".encode("utf-32")}, "a c\u0101t"),
    "UTF-16 without a mark": ({"a.jpg": "", "a.txt": "a cat at night".encode("utf-16-le")}, "a cat at night"),
    "cp1252": ({"a.jpg": "", "a.txt": b"caf\xe9 \x93x\x94"}, "caf\u00e9 \u201cx\u201d"),
    "bytes that cp1252 lacks": ({"a.jpg": "", "a.txt": b"caf\xe9\x81"}, "caf\u00e9\x81"),
    "NUL": ({"a.jpg": "", "a.txt": b"a c\0at"}, "a cat"),
    "lone surrogate in json": ({"a.jpg": "", "a.json": '{"caption": "a \\ud800cat"}'}, "a cat"),
    "pair of surrogates in json": ({"a.jpg": "", "a.json": '{"caption": "\\ud83d\\ude00"}'}, "\U0001f600"),
    "surrogates in bytes": ({"a.jpg": "", "a.txt": b"a \xed\xa0\x80cat \xed\xa0\xbd\xed\xb8\x80"}, "a cat \U0001f600"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "shard"])
@pytest.mark.parametrize("kind", SIDECARS)
def test_captions_next_to_images(kind: str, form: str, tmp_path: Path) -> None:
    files, expected = SIDECARS[kind]
    name = lay(tmp_path, files) if form == "folder" else tar(tmp_path / "a.tar", files)
    source = open_source(name, 8)
    assert len(source) == 1
    assert source.caption(0) == source.load(0)[1] == expected
    source.caption(0).encode()


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_guessed_encodings_and_repairs_are_named(form: str, tmp_path: Path) -> None:
    texts: dict[str, bytes] = {
        "a": b"caf\xe9",
        "b": b"x\0y",
        "c": "f\u00fcr".encode(),
        "d": b"\x81\xe9",
        "e": "x".encode("utf-16"),
    }
    files: dict[str, bytes | str] = {f"{key}.png": "" for key in texts} | {
        f"{key}.txt": text for key, text in texts.items()
    }
    files |= {"f.png": "", "f.txt": "w" * (MAX_CAPTION + 5), "g.png": "", "g.txt": "\u0101" * 10**6}
    name = lay(tmp_path, files) if form == "folder" else tar(tmp_path / "a.tar", files)
    source = open_source(name, 8)
    prefix = "" if form == "folder" else "a.tar/"
    lengths = [len(source.caption(i)) for i in range(len(source))]
    assert lengths[5:] == [MAX_CAPTION, MAX_CAPTION]
    assert source.findings.encodings == {
        f"{prefix}a.txt": "cp1252", f"{prefix}b.txt": "NUL removed", f"{prefix}d.txt": "latin-1"}  # fmt: skip
    assert source.findings.cut == {f"{prefix}f.txt": MAX_CAPTION + 5, f"{prefix}g.txt": 10**6}


@pytest.mark.parametrize("form", ["folder", "shard"])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'{"caption": "a', "a.json is not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json is not valid JSON"),
        ("a.txt", b"\xff\xfea", "begins as utf-16-le"),
        ("a.cls", b"cat", "class 'cat' is no whole number"),
        ("a.cls", b"", "class '' is no whole number"),
        ("a.cls", b"-1", "no whole number from 0 on"),
    ],
)
def test_a_damaged_sidecar_leaves_its_image_out_and_is_one_line(
    name: str, data: bytes, message: str, form: str, tmp_path: Path
) -> None:
    files: dict[str, bytes | str] = {"a.png": "", name: data, "b.png": "", "b.json": '{"caption": "x"}'}
    source = open_source(lay(tmp_path, files) if form == "folder" else tar(tmp_path / "a.tar", files), 8)
    for error in (DataError, UnreadableImage):
        with pytest.raises(error, match=message):
            _ = (source.caption(0), source.label(0))
    assert source.identity(0) != source.identity(1)


def test_classes_in_files(tmp_path: Path) -> None:
    files = {
        "a.png": "",
        "a.cls": b"\xef\xbb\xbf7\r\n",
        "b.png": "",
        "b.CLS": "3",
        "c.png": "",
        "d.1.png": "",
        "d.cls": "2",
    }
    expected = {"a.png": 7, "b.png": 3, "c.png": None, "d.1.png": 2}
    assert labels(lay(tmp_path / "f", files)) == expected
    shard = labels(tar(tmp_path / "a.tar", files))
    assert list(shard.values()) == list(expected.values())
    for value in (1.5, "x", float("nan"), float("inf"), [1], -3):
        with pytest.raises(DataError, match="is no whole number"):
            as_label(value, "x")
    assert as_label(3.0, "x") == as_label(" 3\n", "x") == 3


def test_values_that_are_no_captions() -> None:
    assert as_texts([" a ", "", None, 3, 2.5, True, float("nan"), {"b": 1}, ["c"], b"caf\xe9"]) == [
        "a",
        "3",
        "2.5",
        "caf\u00e9",
    ]


def test_decoding_stops_inside_a_character() -> None:
    assert decode_text("\u0101".encode()[:1] * 0 + b"ab\xc4", "x", cut=True) == ("ab", None)
    assert decode_text(b"ab\xc4", "x") == ("ab\u00c4", "cp1252")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folders_name_is_a_caption_only_where_folders_are_classes(tmp_path: Path) -> None:
    assert captions(lay(tmp_path / "a", {"images/x.png": "", "images/y.png": ""})) == {
        "images/x.png": "",
        "images/y.png": "",
    }
    assert captions(lay(tmp_path / "b", {"holiday/x.png": ""})) == {"holiday/x.png": ""}
    two = lay(tmp_path / "c", {"big_cat/x.png": "", "dog/x.png": "", "z.png": ""})
    assert captions(two) == {"big_cat/x.png": "big cat", "dog/x.png": "dog", "z.png": ""}
    assert labels(two) == {"big_cat/x.png": 0, "dog/x.png": 1, "z.png": None}
    chunks = lay(tmp_path / "d", {"00000/x.png": "", "00001/y.png": ""})
    assert set(captions(chunks).values()) == {""}
    assert list(labels(chunks).values()) == [0, 1]
    assert open_source(chunks, 8).findings.notes == ("the folders are numbered pieces: their names are not captions",)
    inside = lay(tmp_path / "e", {"n01/images/x.png": "", "n02/images/y.png": ""})
    assert labels(inside) == {"n01/images/x.png": 0, "n02/images/y.png": 1}
    assert open_source(inside, 8).findings.class_names == ("n01", "n02")
    mixed = lay(tmp_path / "f", {"images/x.png": "", "cat/x.png": ""})
    assert set(captions(mixed).values()) == {""}
    assert set(labels(mixed).values()) == {None}


def test_a_container_next_to_classes_is_a_class(tmp_path: Path) -> None:
    files = dict.fromkeys(("cartoon/1.png", "photo/1.png", "sketch/1.png"), "")
    found = {"cartoon/1.png": 0, "photo/1.png": 1, "sketch/1.png": 2}
    assert labels(lay(tmp_path / "a", files)) == found
    assert captions(str(tmp_path / "a"))["photo/1.png"] == "photo"
    assert labels(lay(tmp_path / "b", {f"train/{name}": "" for name in files} | {"test/cartoon/1.png": ""})) == {
        f"train/{name}": number for name, number in found.items()
    }
    inside = dict.fromkeys(("cat/images/1.png", "cat/extra/1.png", "dog/images/1.png"), "")
    assert open_source(lay(tmp_path / "c", inside), 8).findings.class_names == ("cat", "dog", "extra")


def test_classes_whose_folders_end_alike(tmp_path: Path) -> None:
    name = lay(tmp_path, {"a/x/1.png": "", "b/x/2.png": "", "b/y/3.png": ""})
    assert labels(name) == {"a/x/1.png": 0, "b/x/2.png": 1, "b/y/3.png": 2}
    assert open_source(name, 8).findings.class_names == ("a/x", "b/x", "y")
    assert captions(name)["b/x/2.png"] == "b x"


@pytest.mark.parametrize(("train", "other"), [("train", "val"), ("Training", "TEST"), ("train2017", "val2017")])
def test_only_one_split_is_read(train: str, other: str, tmp_path: Path) -> None:
    files = {
        f"{train}/cat/1.png": "",
        f"{train}/dog/2.png": "",
        f"{other}/cat/3.png": "",
        f"{other}/cow/4.png": "",
        "logo.png": "",
    }
    name = lay(tmp_path, files)
    assert labels(name) == {f"{train}/cat/1.png": 0, f"{train}/dog/2.png": 1}
    source = open_source(name, 8)
    assert source.findings.class_names == ("cat", "dog")
    assert counts(source.findings.unused) == {f"image in {other}/": 2, "image next to the splits": 1}
    assert "only the split 'train' is read" in source.findings.notes[0]
    chosen = "val" if "val" in other else "test"
    assert list(labels(name, split=chosen).values()) == [0, 1]
    assert open_source(name, 8, SourceOptions(split=chosen)).findings.class_names == ("cat", "cow")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (("DIV2K_train_HR/1.png", "DIV2K_valid_HR/2.png"), {"DIV2K_train_HR/1.png": None}),
        (("trainA/1.png", "trainB/1.png", "testA/2.png"), {"trainA/1.png": 0, "trainB/1.png": 1}),
        (("cat_train/1.png", "dog_train/2.png", "cat_test/3.png"), {"cat_train/1.png": 0, "dog_train/2.png": 1}),
        (("test tube/1.png", "train station/2.png"), {"test tube/1.png": 0, "train station/2.png": 1}),
        (("my_train/1.png", "other/2.png"), {"my_train/1.png": 0, "other/2.png": 1}),
    ],
)
def test_splits_by_a_word_in_the_names_of_folders(
    tmp_path: Path, files: tuple[str, ...], read: dict[str, int | None]
) -> None:
    where = lay(tmp_path, dict.fromkeys(files, ""))
    assert labels(where) == read
    assert sum(counts(open_source(where, 8).findings.unused).values()) == len(files) - len(read)


def test_a_class_keeps_its_name_without_the_splits_word(tmp_path: Path) -> None:
    where = lay(tmp_path, dict.fromkeys(("a_train_x/1.png", "b_train/2.png", "a_test_x/3.png"), ""))
    assert open_source(where, 8).findings.class_names == ("a_x", "b")


def test_numbered_classes_whose_order_is_another_are_noted(tmp_path: Path) -> None:
    few = lay(tmp_path / "few", {f"{n}/1.png": "" for n in range(10)})
    many = lay(tmp_path / "many", {f"{n}/1.png": "" for n in range(12)})
    assert open_source(few, 8).findings.notes == ()
    assert open_source(many, 8).findings.notes == (
        "the folders are numbers, and classes follow the order of names as text: folder 10 is class 2",
    )


def test_splits_inside_classes_and_what_is_refused(tmp_path: Path) -> None:
    deep = lay(
        tmp_path / "a", {"cup/train/1.png": "", "cup/test/2.png": "", "pen/train/3.png": "", "pen/test/4.png": ""}
    )
    assert captions(deep) == {"cup/train/1.png": "cup", "pen/train/3.png": "pen"}
    only = lay(tmp_path / "b", {"train/cat/1.png": "", "train/dog/2.png": "", "val/readme.txt": "x"})
    assert list(labels(only).values()) == [0, 1]
    with pytest.raises(DataError, match=r"holds test/, val/ but no train/; set data\.split"):
        open_source(lay(tmp_path / "c", {"val/1.png": "", "test/2.png": ""}), 8)
    with pytest.raises(DataError, match=r"images in extra/ next to them; name the folder"):
        open_source(lay(tmp_path / "d", {"train/1.png": "", "val/2.png": "", "extra/3.png": ""}), 8)
    with pytest.raises(DataError, match=r"data\.split 'val': .* has no folders named after splits"):
        open_source(lay(tmp_path / "e", {"cat/1.png": "", "dog/2.png": ""}), 8, SourceOptions(split="val"))


def test_nobody_trains_on_hidden_files_and_thumbnails(tmp_path: Path) -> None:
    junk = {".ipynb_checkpoints/a-checkpoint.png": "", "__MACOSX/._a.png": "", "@eaDir/a.jpg/THUMB.jpg": "", ".git/x.png": "",
            "Thumbnails/a.png": "", "._a.png": "", "Thumbs.db": "x", ".DS_Store": "x", "desktop.ini": "x"}  # fmt: skip
    source = open_source(lay(tmp_path / "f", {"a.png": "", **junk}), 8)
    assert [source.key(i) for i in range(len(source))] == ["a.png"]
    assert counts(source.findings.unused) == {"hidden or thumbnail folder": 5, "hidden file": 4}
    shard = open_source(tar(tmp_path / "a.tar", {"a.png": "", "./b.png": "", **junk}), 8)
    assert [shard.key(i) for i in range(len(shard))] == ["a.tar/a", "a.tar/b"]
    assert counts(shard.findings.unused) == {"hidden file": 9}


def test_what_is_neither_image_nor_caption_is_counted_by_kind(tmp_path: Path) -> None:
    files = {"a.jfif": image_bytes(1, "JPEG"), "b.jpe": image_bytes(2, "JPEG"), "c.ppm": image_bytes(3, "PPM"),
             "d.jp2": image_bytes(4, "JPEG2000"), "e.PNG": image_bytes(5), "f.mp4": "x", "g.MP4": "x", "h.heic": "x",
             "i.psd": "x", "j.txt": "x", "k.json": "{}", "l.cls": "1", "README": "x",
             "e.mask.png": image_bytes(6), "m.svg": "x"}  # fmt: skip
    expected = {".mp4": 2, ".heic (needs pillow-heif)": 1, ".psd (not an image that davae reads)": 1,
                "caption without an image": 1,
                ".json without an image": 1, ".cls without an image": 1, "no ending": 1, "other part of a sample": 1,
                ".svg (not an image that davae reads)": 1}  # fmt: skip
    for name in (lay(tmp_path / "f", files), tar(tmp_path / "a.tar", files)):
        source = open_source(name, 8)
        assert [source.load(i)[0].size for i in range(len(source))] == [(9, 8)] * 5
        assert counts(source.findings.unused) == expected
    assert source.findings.unused[".mp4"].names == ["a.tar/f.mp4", "a.tar/g.MP4"]
    with pytest.raises(DataError, match=r"holds no images \(found 1 \.zip, e\.g\. deep/x\.zip"):
        open_source(lay(tmp_path / "n", {"deep/x.zip": "x"}), 8)
    with pytest.raises(DataError, match=r"deep/x\.tar is not a whole tar file"):
        open_source(lay(tmp_path / "m", {"deep/x.tar": "x"}), 8)


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    lay(tmp_path / "store", {"cat/1.png": "", "cat/1.txt": "my cat", "cow/2.png": ""})
    root = tmp_path / "set"
    lay(root, {"dog/1.png": "", "dog/more/2.png": ""})
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "dog" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "dog")
    (root / "up").symlink_to(tmp_path)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    (root / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "linked.png").symlink_to(tmp_path / "store" / "cow" / "2.png")
    source = open_source(str(root), 8)
    found = {source.key(i): source.label(i) for i in range(len(source))}
    assert found == {"cat/1.png": 0, "dog/1.png": 1, "dog/linked.png": 1, "dog/lost.png": 1, "dog/more/2.png": 2}
    assert source.caption(0) == "my cat"
    assert counts(source.findings.unused) == {"broken link": 2, "link to a folder that is read already": 3}
    with pytest.raises(UnreadableImage, match="missing file"):
        source.load(3)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name, content in ((b"caf\xe9.png", image_bytes()), (b"caf\xe9.txt", b"coffee")):
        try:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
        except OSError:
            pytest.skip("this file system takes UTF-8 names alone")
    (tmp_path / "b.png").write_bytes(image_bytes())
    source = open_source(str(tmp_path), 8)
    assert [source.key(i) for i in range(2)] == ["b.png", "caf\\xe9.png"]
    assert source.load(1)[1] == "coffee"
    tarfile_name = tar(
        tmp_path / "s" / "a.tar", {os.fsdecode(b"caf\xe9.png"): "", os.fsdecode(b"caf\xe9.txt"): "coffee"}
    )
    assert captions(tarfile_name) == {"a.tar/caf\\xe9": "coffee"}
    from davae.data.images import split
    from davae.data.latent_cache.key import hash_images

    assert len(split(source, 0.5).train) >= 1
    assert hash_images(source, [0, 1])


# -- metadata files ----------------------------------------------------------------------------------------------------

ROWS = [
    {"file_name": "a.png", "text": "a cat"},
    {"file_name": "sub/b.png", "text": "a dog"},
    {"file_name": "none.png", "text": "x"},
]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metadata.jsonl", as_jsonl),
        ("metadata.jsonl", lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows).replace(b"\n", b"\r\n") + b"\r\n\r\n"),
        ("metadata.jsonl", lambda rows: as_jsonl(rows).decode().encode("utf-16")),
        ("metadata.csv", as_csv),
        ("Metadata.CSV", lambda rows: b"\xef\xbb\xbf" + as_csv(rows, ";")),
        (
            "metadata.csv",
            lambda rows: as_csv([{**row, "file_name": row["file_name"].replace("/", "\\")} for row in rows]),
        ),
        ("metadata.parquet", as_parquet),
    ],
)
def test_metadata_of_an_imagefolder(name: str, write: Any, tmp_path: Path) -> None:
    where = lay(tmp_path, {"a.png": "", "sub/b.png": "", "sub/c.png": "", name: write(ROWS)})
    assert captions(where) == {"a.png": "a cat", "sub/b.png": "a dog", "sub/c.png": ""}
    found = open_source(where, 8).findings
    assert found.layout == f"folder with {name}"
    assert found.captions_from == "metadata, column text"
    assert counts(found.unused) == {"row of metadata without an image": 1}


def test_nested_metadata_columns_labels_and_several_rows(tmp_path: Path) -> None:
    rows = [{"file_name": "../s2/b.png", "blip": ["b1", "b2"], "kind": 4}, {"file_name": "./a.png", "blip": "a1", "kind": 3},
            {"file_name": "a.png", "blip": "a2", "kind": 3}, {"file_name": "a.png", "blip": "a1", "kind": 3}]  # fmt: skip
    files = {"s1/a.png": "", "s2/b.png": "", "s1/metadata.jsonl": as_jsonl([*rows, rows[0]])}
    where = lay(tmp_path, files)
    for options in ({"caption_key": "blip", "label_key": "kind"}, {"caption_column": "blip", "label_column": "kind"}):
        source = open_source(where, 8, SourceOptions(**options))
        assert [source.label(i) for i in range(2)] == [3, 4]
        assert {source.caption(0, np.random.default_rng(i)) for i in range(30)} == {"a1", "a2"}
        assert {source.caption(1, np.random.default_rng(i)) for i in range(30)} == {"b1", "b2"}
    assert counts(source.findings.duplicates) == {"equal rows of metadata, read once": 1}
    assert captions(where) == {"s1/a.png": "", "s2/b.png": ""}
    with pytest.raises(DataError, match="has no column 'blop'; found file_name, blip, kind"):
        open_source(where, 8, SourceOptions(caption_key="blop"))
    before = source.identity(0)
    lay(tmp_path, {"s1/metadata.jsonl": as_jsonl(rows).replace(b"a2", b"a3")})
    assert open_source(where, 8, SourceOptions(**options)).identity(0) != before


def test_metadata_of_another_split_and_a_text_file_as_well(tmp_path: Path) -> None:
    rows = [{"file_name": "train/a.png", "caption": "one"}, {"file_name": "val/b.png", "caption": "two"}]
    where = lay(
        tmp_path,
        {
            "train/a.png": "",
            "val/b.png": "",
            "metadata.jsonl": as_jsonl(rows),
            "train/c.png": "",
            "train/c.txt": "three",
        },
    )
    assert captions(where) == {"train/a.png": "one", "train/c.png": "three"}
    found = open_source(where, 8).findings
    assert counts(found.unused) == {"image in val/": 1}
    assert found.captions_from == "metadata, column caption, else .txt"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"\n', r"metadata.jsonl, line 1: not valid JSON"),
        ("metadata.jsonl", b"[1]", "found list where an object belongs"),
        ("metadata.jsonl", b'{"image": "a.png"}', "without the column file_name, found image"),
        ("metadata.csv", b"name,text\na.png,x\n", "without the column file_name, found name, text"),
        ("metadata.parquet", b"PAR1", "is not a parquet file that can be read"),
        ("metadata.parquet", b"damaged name", "is not a parquet file that can be read"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "n": 1}\n{"file_name": "a.png", "n": 2}',
            "has n 1 and 2; keep one row",
        ),
    ],
)
def test_damaged_metadata_is_one_line(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if data == b"damaged name":
        data = as_parquet([{"file_name": "a.png"}]).replace(b"file_name", b"file_n\xffme")
    where = lay(tmp_path, {"a.png": "", name: data})
    with pytest.raises(DataError, match=message):
        open_source(where, 8, SourceOptions(label_key="n") if b'"n"' in data else None)


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["gzip", "bz2", "xz", "gzip under its own name"])
def test_compressed_shards_are_found_by_their_first_bytes(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    pack = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing.split()[0]]
    shard = tmp_path / ("sa_000.tar.gz" if "own" in packing else "sa_000.tar")
    tar(shard, {"sa_1.png": image_bytes(7), "sa_1.txt": "one", "sa_2.png": ""})
    plain = shard.read_bytes()
    shard.write_bytes(pack(plain))
    source = open_source(str(shard), 8)
    assert [source.caption(i) for i in range(2)] == ["one", ""]
    assert source.load(0)[0].getpixel((0, 0)) == (7, 0, 0)
    assert source.key(0) == f"{shard.name}/sa_1"
    moved = tmp_path / "elsewhere" / shard.name
    moved.parent.mkdir()
    shard.rename(moved)
    os.utime(moved, (1, 1))
    assert len(open_source(str(moved.parent), 8)) == 2
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1, "unpacked once, wherever it lies"
    moved.write_bytes(pack(plain)[:-30])
    with pytest.raises(DataError, match=r"packed with .*: .* is not a whole"):
        open_source(str(moved), 8)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


def test_a_compression_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.data.shards.copies.compr", {})
    (tmp_path / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 600)
    with pytest.raises(DataError, match="packed with zstd; `pip install zstandard`, or unpack it first"):
        open_source(str(tmp_path / "a.tar"), 8)


def test_remote_compressed_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    tar(tmp_path / "a.tar", {"1.png": "", "1.txt": "one"})
    with fsspec.open("memory://layouts/a.tar", "wb") as stream:
        stream.write(gzip.compress((tmp_path / "a.tar").read_bytes()))  # type: ignore[union-attr]
    assert list(captions("memory://layouts/a.tar").values()) == ["one"]
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


def test_members_that_come_twice(tmp_path: Path) -> None:
    name = tar(
        tmp_path / "a.tar",
        [("1.png", image_bytes(1)), ("1.txt", "old"), ("2.png", ""), ("./1.txt", "new"), ("1.png", image_bytes(9))],
    )
    source = open_source(name, 8)
    assert (source.load(0)[0].getpixel((0, 0)), source.load(0)[1], len(source)) == ((9, 0, 0), "new", 2)
    assert counts(source.findings.duplicates) == {"member that comes twice, the last one is read": 2}


@pytest.mark.parametrize(
    "names", [("1.png", "1.jpg"), ("1.JPG", "1.jpg"), ("d/1.png", "d/1.webp"), ("./1.png", "1.bmp")]
)
def test_two_images_of_one_key_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.tar: .*1\..* and .*1\..* are two images of one key \(1 such pairs\); keep one"
    ):
        open_source(tar(tmp_path / "a.tar", dict.fromkeys((*names, "2.png"), "")), 8)


def test_keys_in_folders_case_and_composed_accents_stay_apart(tmp_path: Path) -> None:
    files = {"a/1.png": "", "a/1.txt": "a", "b/1.png": "", "b/1.txt": "b", "X.png": "", "X.txt": "upper", "x.png": "",
             "x.txt": "lower",
             "e\u0301.png": "", "e\u0301.txt": "two", "\u00e9.png": "", "\u00e9.txt": "one"}  # fmt: skip
    found = captions(tar(tmp_path / "a.tar", files))
    assert list(found.values()) == ["a", "b", "upper", "lower", "two", "one"]
    assert len(found) == 6


def test_parts_of_a_sample_are_no_images(tmp_path: Path) -> None:
    files = {"000.jpg": image_bytes(5, "JPEG"), "000.seg.png": "", "000.json": '{"caption": "x"}',
             "1.image.png": image_bytes(6), "1.mask.png": "", "1.caption": "y", "p.1.jpg": "", "p.2.jpg": ""}  # fmt: skip
    source = open_source(tar(tmp_path / "a.tar", files), 8)
    assert {source.key(i): source.caption(i) for i in range(len(source))} == {
        "a.tar/000": "x", "a.tar/1.image": "y", "a.tar/p.1": "", "a.tar/p.2": ""}  # fmt: skip
    assert counts(source.findings.unused) == {"other part of a sample": 2}


def test_shards_of_one_name_and_shards_named_twice(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        tar(tmp_path / folder / "0.tar", {"1.png": "", "1.txt": folder})
    tar(tmp_path / "y" / "1.tar", {"1.png": "", "1.txt": "z"})
    (tmp_path / "y" / "2.tar").symlink_to(tmp_path / "y" / "1.tar")
    (tmp_path / "y" / "._1.tar").write_bytes(b"litter")
    assert captions(f"{tmp_path}/*/*.tar") == {"x/0.tar/1": "x", "y/0.tar/1": "y", "1.tar/1": "z"}
    found = open_source(f"{tmp_path}/{{x,y,x}}/[0-9].tar", 8).findings
    assert counts(found.duplicates) == {"shard that is named twice, read once": 1}


def test_links_and_sparse_members(tmp_path: Path) -> None:
    data = image_bytes(3) + b"\0" * 4096
    (tmp_path / "sparse.png").write_bytes(data)
    tar(tmp_path / "a.tar", {"d/1.png": image_bytes(4), "d/1.txt": "one"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind, target in (("h.png", tarfile.LNKTYPE, "d/1.png"), ("d/s.png", tarfile.SYMTYPE, "1.png"),
                                   ("t.png", tarfile.SYMTYPE, "h.png"), ("gone.png", tarfile.LNKTYPE, "no.png"),
                                   ("h.txt", tarfile.SYMTYPE, "./d/1.txt")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    source = open_source(str(tmp_path / "a.tar"), 8)
    found = {source.key(i): source.caption(i) for i in range(len(source))}
    assert found == {"a.tar/d/1": "one", "a.tar/h": "one", "a.tar/d/s": "", "a.tar/t": ""}
    assert {source.load(i)[0].getpixel((0, 0)) for i in range(4)} == {(4, 0, 0)}
    assert counts(source.findings.unused) == {"broken link": 1}


def sparse_tar(path: Path, data: bytes, pieces: list[tuple[int, int]]) -> None:
    """An old GNU sparse member, which tarfile reads but cannot write."""
    info = tarfile.TarInfo("1.png")
    info.size = sum(length for _, length in pieces)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[156:157] = b"S"
    for number, (at, length) in enumerate(pieces):
        head[386 + 24 * number : 386 + 24 * number + 24] = b"%011o\0%011o\0" % (at, length)
    head[483:495] = b"%011o\0" % len(data)
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    body = b"".join(data[at : at + length] for at, length in pieces)
    path.write_bytes(bytes(head) + body + b"\0" * (-len(body) % 512) + b"\0" * 1024)


def test_a_sparse_member_is_read_with_its_holes(tmp_path: Path) -> None:
    pixels = Image.new("RGB", (40, 40), (0, 0, 0))
    pixels.putpixel((1, 1), (9, 9, 9))
    buffer = io.BytesIO()
    pixels.save(buffer, "BMP")
    data = buffer.getvalue()
    assert not any(data[1024:2048])
    sparse_tar(tmp_path / "a.tar", data, [(0, 1024), (2048, len(data) - 2048)])
    source = open_source(str(tmp_path / "a.tar"), 8)
    assert (source.size(0), source.load(0)[0].getpixel((1, 1))) == ((40, 40), (9, 9, 9))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(form: int, tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "\u0101" * 110
    found = captions(tar(tmp_path / "a.tar", {f"{long}.png": "", f"{long}.txt": "x"}, format=form))
    assert found == {f"a.tar/{long}": "x"}


def test_a_shard_cut_inside_its_last_file(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"1.png": "", "2.txt": "x" * 2000})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"x" * 100)])
    with pytest.raises(DataError, match="is not a whole tar file"):
        open_source(str(tmp_path / "a.tar"), 8)


def test_only_the_head_of_a_member_is_read_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    source = open_source(tar(tmp_path / "a.tar", {"1.png": buffer.getvalue()}), 8)
    read: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: (read.append(size), real(fd, size, at))[1])
    assert source.size(0) == (800, 600)
    assert sum(read) < 0.1 * len(buffer.getvalue())


# -- braces, sample files, identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("a-{2..0}.tar", ["a-2.tar", "a-1.tar", "a-0.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("{a,b{0..1}}.tar", ["a.tar", "b0.tar", "b1.tar"]),
        ("a{x}.tar", ["a{x}.tar"]),
        ("a{}.tar", ["a{}.tar"]),
        ("pipe:awk '{print $1,$2}' {0..1}.tar", ["pipe:awk '{print $1,$2}' 0.tar", "pipe:awk '{print $1,$2}' 1.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{0..99999999}.tar",
        "{0..9}" * 9 + ".tar",
        "{{0..9999},{0..9999}}{0..9999}.tar",
        "{1..9" + "9" * 60 + "}.tar",
    ],
)
def test_absurd_patterns_are_refused_at_once(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.data.shards.names.MAX_SHARDS", 1000)
    with pytest.raises(DataError, match="names more than 1,000 shards; use a smaller range"):
        open_source(pattern, 8)


def test_sample_files_are_bounded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((4, 8, 9, 3), np.uint8)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images, np.arange(4))
    assert open_source(str(path), 8).label(3) == 3
    monkeypatch.setattr("davae.data.npz.UNPACKED", 800)
    with pytest.raises(DataError, match=r"arr_0.npy is compressed and takes .* save it with np\.savez"):
        open_source(str(path), 8)
    np.savez(path, images, np.arange(4))
    assert open_source(str(path), 8).load(3)[0].size == (9, 8)
    for labels_, message in (
        (np.arange(3), r"arr_1 is \(3,\) int64, expected one whole number for each of the 4 images"),
        (np.zeros((4, 10), np.int64), "expected one whole number"),
        (np.zeros(4), "expected one whole number"),
    ):
        np.savez(path, images, labels_)
        with pytest.raises(DataError, match=message):
            open_source(str(path), 8)
    np.savez(path, images[:0])
    with pytest.raises(DataError, match=r"a\.npz"):
        open_source(str(path), 8)


@pytest.mark.parametrize(
    "case", ["objects", "cut", "text", "other array", "huge shape", "damaged bytes", "open bracket"]
)
def test_damaged_sample_files_are_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.zeros((4, 8, 9, 3), np.uint8))
    whole = path.read_bytes()
    if case == "objects":
        np.savez(path, np.array([{}, 1], object))
    elif case == "open bracket":
        np.savez(path, np.zeros((4, 8, 9, 3), np.uint8))
        path.write_bytes(path.read_bytes().replace(b"9, 3), ", b"9, 3   "))
    elif case == "other array":
        np.savez(path, x=np.zeros(3))
    elif case == "huge shape":
        with zipfile.ZipFile(path, "w") as archive:
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 999, 999, 3)}
            )
            archive.writestr("arr_0.npy", head.getvalue(), zipfile.ZIP_DEFLATED)
    else:
        path.write_bytes(
            {"cut": whole[:200], "text": b"hello", "damaged bytes": whole[:90] + b"\xff" * 30 + whole[120:]}[case]
        )
    with pytest.raises(DataError, match=r"a\.npz"):
        open_source(str(path), 8)


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_sets_that_were_read_right_keep_the_key_of_their_cache(form: str, tmp_path: Path) -> None:
    """Bytes as earlier versions made them, so that no cache becomes stale without a reason."""
    files = {
        "a/1.png": "",
        "a/1.txt": " caf\u00e9 \n",
        "a/1.cls": "4",
        "b_c/2.png": "",
        "b_c/2.json": '{"k": 1}',
        "b_c/3.png": "",
        "b_c/3.txt": b"",
    }
    source = open_source(lay(tmp_path, files) if form == "folder" else tar(tmp_path / "a.tar", files), 8)
    size = str(len(image_bytes())).encode()
    assert [source.identity(i) for i in range(3)] == [
        size + b"\0" + " caf\u00e9 \n".encode() + b"\x004", size + b"\0\0", size + b"\0\0"]  # fmt: skip
    changed = {"a/1.txt": b"caf\xe9", "b_c/2.json": '{"caption": "x"}', "b_c/3.TXT": "y"}
    again = {**{k: v for k, v in files.items() if k != "b_c/3.txt"}, **changed}
    (tmp_path / "b_c" / "3.txt").unlink(missing_ok=True)
    other = open_source(lay(tmp_path, again) if form == "folder" else tar(tmp_path / "a.tar", again), 8)
    before = [size + b"\0" + b"caf\xe9" + b"\x004", size + b"\0\0", size + b"\0\0"]
    assert all(other.identity(i) != before[i] for i in range(3)), "captions that were misread make a new cache"


def test_a_single_folder_makes_a_new_cache_because_its_name_was_the_caption(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path, {"images/1.png": ""}), 8)
    assert source.identity(0) != str(len(image_bytes())).encode() + b"\0\0"


def test_the_option_for_floats_is_part_of_a_recipe(tiny_base: Path) -> None:
    from conftest import tiny_upgrade_recipe

    values = tiny_upgrade_recipe(tiny_base, tiny_base)
    assert validate({**values, "data": {"float_pixels": "unit"}}, "x").data.float_pixels == "unit"


def test_a_messy_download_folder(tmp_path: Path) -> None:
    """Twenty faults in one folder: what is used, and the exact account of the rest."""
    root = tmp_path / "set"
    lay(root, {
        "a.png": "", "a.TXT": "one", "b.jfif": image_bytes(1, "JPEG"), "b.caption": b"caf\xe9",
        "c.1.PNG": "", "c.json": '{"caption": ["three", "tres"]}', "d.webp": image_bytes(2, "WEBP"),
        "d.webp.txt": b"\xef\xbb\xbffour", "e.png": "", "e.txt": b"", "f.png": b"<html>", "f.txt": "html", "g.heic": "x",
        "h.txt": "orphan", "i.mp4": "x",
        "j.png": b"%!PS-Adobe-3.0 EPSF", "._a.png": "", "Thumbs.db": "x", ".ipynb_checkpoints/a.png": "", "images/k.png": "",
        "images/k.text.txt": "k".encode("utf-16"), "l.png": "", "l.txt": b"l\r\nm", "README.md": "x", "a.caption": "uno",
    })  # fmt: skip
    (root / "n.png").symlink_to(root / "nowhere.png")
    (root / "loop").symlink_to(root)
    source = open_source(str(root), 8)
    assert {source.key(i): source.caption(i) for i in range(len(source))} == {
        "a.png": "one", "b.jfif": "caf\u00e9", "c.1.PNG": "three", "d.webp": "four", "e.png": "", "f.png": "html",
        "images/k.png": "k", "j.png": "", "l.png": "l\nm", "n.png": ""}  # fmt: skip
    found: Findings = source.findings
    assert counts(found.unused) == {
        ".heic (needs pillow-heif)": 1, "caption without an image": 1, ".mp4": 1, "hidden file": 2, ".md": 1,
        "hidden or thumbnail folder": 1, "second caption of an image": 1,
        "link to a folder that is read already": 1}  # fmt: skip
    assert found.encodings == {"b.caption": "cp1252"}
    assert (found.layout, found.captions_from) == ("folder", ".txt, else .json, key caption")
    assert found.notes == ("the names of the folders (images) are neither captions nor classes",)
    faults = {}
    for index in range(len(source)):
        try:
            source.size(index)
        except UnreadableImage as error:
            faults[source.key(index)] = error.kind
    assert faults == {"f.png": "not an image", "j.png": "not an image that davae reads", "n.png": "missing file"}


def test_a_touched_or_copied_table_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from davae.data.images import split
    from davae.data.latent_cache.key import FORMER_DATA, changes, hash_former, hash_images
    from davae.data.tables import TableSource, table_content

    rows = [{"image": image_bytes(i), "text": "x" * i + "\0", "kind": i} for i in range(6)]
    path, other = tmp_path / "a.parquet", tmp_path / "n" / "a.parquet"
    path.write_bytes(as_parquet(rows))
    source = open_source(str(path), 8)
    assert isinstance(source, TableSource)
    assert source.caption(3) == "xxx"
    assert source.findings.encodings == {source.key(3): "NUL removed"}
    before = hash_images(source, range(6))
    old = {"data": hash_former(source, range(6))}
    assert changes(old, {"data": before, FORMER_DATA: hash_former(source, range(6))}) == []
    assert changes(old, {"data": before}) != []
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    os.utime(other, (1, 1))
    copied = open_source(str(other), 8)
    assert hash_images(copied, range(6)) == before
    assert split(copied, 0.5) == split(source, 0.5)
    first = table_content(str(path))
    path.write_bytes(as_parquet([*rows[:5], {**rows[5], "text": "y"}]))
    assert table_content(str(path)) != first
    assert table_content("org/name") is None


def test_an_index_of_many_samples_is_kept_and_made_again_when_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from davae.data.shards import tar_index as shard_index

    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "KEPT_FROM", 2)
    opened: list[Path] = []
    real = shard_index.read_index
    monkeypatch.setattr(shard_index, "read_index", lambda shard: (opened.append(shard), real(shard))[1])
    name = tar(tmp_path / "a.tar", [("1.png", ""), ("1.txt", "one"), ("2.png", ""), ("1.txt", "uno"), ("x.mp4", "x")])
    first = open_source(name, 8)
    again = open_source(name, 8)
    assert len(opened) == 1
    for source in (first, again):
        assert (
            captions(name)
            == {source.key(i): source.caption(i) for i in range(2)}
            == {"a.tar/1": "uno", "a.tar/2": ""}
        )
        assert counts(source.findings.unused) == {".mp4": 1}
        assert counts(source.findings.duplicates) == {"member that comes twice, the last one is read": 1}
    assert again.findings == first.findings
    (kept,) = (tmp_path / "cache" / "indexes").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-200])
    assert len(open_source(name, 8)) == 2
    assert len(opened) == 2, "a damaged index is made again"
    tar(tmp_path / "a.tar", {"1.png": "", "2.png": "", "3.png": ""})
    assert len(open_source(name, 8)) == 3
    (tmp_path / "cache2").write_bytes(b"no folder")
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache2"))
    assert len(open_source(name, 8)) == 3, "a place that cannot be written only costs time"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        ("a.TXT", "one\ntw\u0101".encode("utf-16"), ["one", "tw\u0101"]),
        ("a.txt", b"caf\xe9", ["caf\u00e9"]),
        ("a.csv", b"\xef\xbb\xbfprompt,x\r\none,1\r\n,2\r\n", ["one"]),
        ("a.tsv", b"Prompt\tx\ncaf\xe9\t1", ["caf\u00e9"]),
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": null}', ["one"]),
        ("a.json", '["one"]'.encode("utf-16"), ["one"]),
        ("a.json", b"5", "found int where"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b'{"prompt": ', "cannot be read"),
        ("a.jsonl", '{"prompt": "one\u2028two"}\r\n"three"'.encode(), ["one\u2028two", "three"]),
        ("a.txt", "one\u2028two\rthree\n".encode(), ["one\u2028two", "three"]),
        ("a.csv", b"x,prompt\n1,one, two\n", ["one, two"]),
        ("a.csv", b"prompt,x\none, two,1\n", "line 2: 3 cells in the 2 columns prompt, x; quote the one"),
        ("a.txt", b"w" * 20_000, "prompt 0 has 20,000 characters; at most 10,000"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_prompt_files_in_any_encoding(name: str, data: bytes, expected: list[str] | str, tmp_path: Path) -> None:
    from davae.data.prompts import read_prompts

    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    if isinstance(expected, list):
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_prompts(tmp_path / name)


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
BLOCKS = re.findall(r"```layout\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
LINE = re.compile(r'(?P<file>\S+)(?: += (?P<content>.*)| +-> "(?P<caption>.*?)"(?:, class (?P<label>\d+))?)?')


@pytest.mark.parametrize("block", BLOCKS)
def test_every_layout_of_the_page_is_read_as_written(block: str, tmp_path: Path) -> None:
    lines = block.splitlines()
    shard = lines.pop(0).removesuffix(":") if lines[0].endswith(".tar:") else None
    files: dict[str, bytes | str] = {}
    expected: list[tuple[str, int | None]] = []
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        name = found["file"]
        files[name] = (found["content"] or "").replace("|", "\n")
        if found["caption"] is not None:
            expected.append((found["caption"], None if found["label"] is None else int(found["label"])))
    source = open_source(tar(tmp_path / shard, files) if shard else lay(tmp_path / "set", files), 8)
    assert sorted(source.load(i)[1] for i in range(len(source))) == sorted(caption for caption, _ in expected)
    assert {source.caption(i): source.label(i) for i in range(len(source))} == dict(expected)


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (("a.jpg", "a_mask.png", "b.png", "b-masklabel.png"), ["a.jpg", "b.png"]),
        (("face_mask.jpg", "mask.jpg"), ["face_mask.jpg", "mask.jpg"]),
        (("images/a.jpg", "masks/a.png"), ["images/a.jpg"]),
        (("a.jpg", "masks/a_mask.png"), ["a.jpg"]),
        (("images/train/a.jpg", "images/val/b.jpg", "masks/train/a.png", "masks/val/b.png"), ["images/train/a.jpg"]),
        (("train/a.jpg", "val/b.jpg", "train_masks/a_mask.gif"), ["train/a.jpg"]),
        (("image/a.jpg", "conditioning_images/a.jpg"), ["image/a.jpg"]),
        (("cat/a.jpg", "cat/masks/a.png", "dog/b.jpg"), ["cat/a.jpg", "dog/b.jpg"]),
        (("NORMAL/1.jpg", "PNEUMONIA/1.jpg"), ["NORMAL/1.jpg", "PNEUMONIA/1.jpg"]),
        (("HR/1.png", "LR/1.png"), ["HR/1.png"]),
        (("V/JPEGImages/1.jpg", "V/SegmentationClass/1.png", "V/SegmentationObject/1.png"), ["V/JPEGImages/1.jpg"]),
        (("images1024x1024/00/1.png", "thumbnails128x128/00/1.png"), ["images1024x1024/00/1.png"]),
        (("images/1.png", "labels/1.png"), ["images/1.png"]),
        (("images/1.jpg", "annotations/trimaps/1.png"), ["images/1.jpg"]),
        (("a.png", "a-condlabel.png"), ["a.png"]),
        (("hats/1.jpg", "masks/2.jpg", "masks/3.jpg"), ["hats/1.jpg", "masks/2.jpg", "masks/3.jpg"]),
        (("masks/2.jpg", "masks/3.jpg"), ["masks/2.jpg", "masks/3.jpg"]),
        (("glasses/1.jpg", "hat/1.jpg", "mask/1.jpg"), ["glasses/1.jpg", "hat/1.jpg", "mask/1.jpg"]),
        (("s/alpha/1.jpg", "s/beta/1.jpg", "s/gamma/1.jpg"), ["s/alpha/1.jpg", "s/beta/1.jpg", "s/gamma/1.jpg"]),
        (("cat/1.jpg", "dog/2.jpg", "mask/1.png", "mask/2.png"), ["cat/1.jpg", "dog/2.jpg"]),
        (("cat/1.jpg", "cat_masks/1.png", "dog/1.jpg", "dog_masks/1.png"), ["cat/1.jpg", "dog/1.jpg"]),
        (("a/1.jpg", "images/1.jpg", "mask/1.png"), ["a/1.jpg", "images/1.jpg"]),
        (("1.jpg", "a/1.jpg", "mask/1.png"), ["1.jpg", "a/1.jpg"]),
    ],
)
def test_masks_do_not_train(tmp_path: Path, files: tuple[str, ...], read: list[str]) -> None:
    source = open_source(lay(tmp_path, dict.fromkeys(files, "")), 8)
    assert [source.key(index) for index in range(len(source))] == read
    unused = counts(source.findings.unused)
    assert sum(unused.values()) == len(files) - len(read)


@pytest.mark.parametrize("other", ["Dr. Jones.txt", "Dr. Jones.json", "Dr. Jones.cls", "DR. JONES.TXT"])
def test_a_caption_without_an_image_goes_to_no_other_with_the_same_beginning(other: str, tmp_path: Path) -> None:
    files = {"Dr. Smith.jpg": "", "shot 1.0.jpg": "", other: '{"text": "4"}', "shot 1.5.txt": "a view", "b.jpg": ""}
    where = lay(tmp_path, {**files, "b.v2.txt": "a dog", "c.photo.jpg": "", "c.prompt.v3.txt": "a cow"})
    assert captions(where) == {"Dr. Smith.jpg": "", "b.jpg": "a dog", "c.photo.jpg": "a cow", "shot 1.0.jpg": ""}
    unused = counts(open_source(where, 8).findings.unused)
    assert sum(unused.values()) == 2
    assert unused["caption without an image"] == 1 + other.lower().endswith(".txt")
    assert captions(lay(tmp_path / "x", {"a.1.jpg": "", "a.caption.txt": "a cat"})) == {"a.1.jpg": "a cat"}


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_keys_of_captions_in_any_case_and_keys_that_are_not_read(form: str, tmp_path: Path) -> None:
    def place(key: str) -> str:
        files: dict[str, bytes | str] = {"a.png": "", "a.json": json.dumps({"url": "u", key: "a cat"})}
        return tar(tmp_path / f"{key}.tar", files) if form == "shard" else lay(tmp_path / key, files)

    assert list(captions(place("Caption")).values()) == ["a cat"]
    where = place("blip")
    note = "no .json has a usual key of captions; found url, blip; data.caption_key names one"
    assert open_source(where, 8).findings.notes == (note,)
    assert list(captions(where, caption_key="blip").values()) == ["a cat"]


def test_columns_of_captions_in_any_case(tmp_path: Path) -> None:
    where = lay(tmp_path, {"a.png": "", "metadata.csv": "file_name,Caption\na.png,a cat\n"})
    assert captions(where) == {"a.png": "a cat"}
    assert open_source(where, 8).findings.captions_from == "metadata, column Caption"


def test_folders_inside_a_class_are_noted(tmp_path: Path) -> None:
    name = lay(tmp_path, {"dog/1.jpg": "", "dog/puppies/2.jpg": "", "cat/3.jpg": ""})
    assert labels(name) == {"cat/3.jpg": 0, "dog/1.jpg": 1, "dog/puppies/2.jpg": 2}
    assert open_source(name, 8).findings.notes == ("folders inside a class are classes of their own, as dog/puppies",)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("10_sks dog", "5_cat"), ["sks dog", "cat"]),
        (("001.Black_Albatross", "002.Tern"), ["Black Albatross", "Tern"]),
        (("10_sks dog", "cat"), ["10 sks dog", "cat"]),
        (("2019", "2020"), ["", ""]),
    ],
)
def test_numbers_before_the_names_of_folders(tmp_path: Path, folders: tuple[str, ...], expected: list[str]) -> None:
    assert list(captions(lay(tmp_path, {f"{name}/1.jpg": "" for name in folders})).values()) == expected


def test_the_layout_names_a_metadata_file_that_is_read(tmp_path: Path) -> None:
    for split, text in (("train", "a cat"), ("test", "a dog")):
        lay(
            tmp_path,
            {f"{split}/1.jpg": "", f"{split}/metadata.jsonl": json.dumps({"file_name": "1.jpg", "text": text})},
        )
    assert open_source(str(tmp_path), 8).findings.layout == "folder with train/metadata.jsonl"
    assert captions(str(tmp_path)) == {"train/1.jpg": "a cat"}
    assert (
        open_source(str(tmp_path), 8, SourceOptions(split="test")).findings.layout
        == "folder with test/metadata.jsonl"
    )
