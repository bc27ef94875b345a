"""Captions that lie apart from their images: lists of many kinds, and folders of captions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_layouts import captions, counts, image_bytes, labels, lay, tar

from davae.data.options import SourceOptions
from davae.data.sources import open_source
from davae.errors import DataError

COCO = {
    "images": [{"id": 9, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}, {"id": 1, "file_name": "gone.png"}],
    "annotations": [
        {"image_id": 9, "caption": "a cat"},
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 9, "caption": "a pet"},
        {"image_id": 1, "caption": "x"},
    ],
}
ROWS = [{"image": "a.png", "caption": "a cat"}, {"image": "b.png", "caption": "a dog"}]
LISTS: dict[str, str] = {
    "captions.json": json.dumps({"a.png": "a cat", "b.png": ["a dog", "a pet"]}),
    "meta_cap.json": json.dumps({"a": {"caption": "a cat", "tags": "x"}, "b": {"tags": "a dog"}}),  # kohya
    "meta_abs.json": json.dumps(
        {"/home/me/set/images/a.png": {"caption": "a cat"}, "/home/me/set/images/b.png": {"tags": ["a dog"]}}
    ),
    "metadata.json": json.dumps(ROWS),
    "wrapped.json": json.dumps({"data": ROWS}),
    "pairs.json": json.dumps([["a.png", "a cat"], ["b.png", "a dog"]]),
    "annotations/captions_train2017.json": json.dumps(COCO),
    "dataset_coco.json": json.dumps(
        {
            "images": [
                {"filename": f"{n}.png", "sentences": [{"raw": f"a {t}"}]} for n, t in (("a", "cat"), ("b", "dog"))
            ]
        }
    ),
    "train.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
    "captions.txt": "image,caption\na.png,a cat\nb.png,a dog\nb.png,a pet\n",  # Flickr8k
    "results.csv": "image_name| comment_number| comment\na.png| 0| a cat\nb.png| 0| a dog\n",  # Flickr30k
    "token.txt": 'a.png#0\ta cat\na.png#1\ta "pet\nb.png#0\ta dog\n',
    "plain.txt": "a.png|a cat\nb.png|a dog\n",
    "quoted.csv": '"a.png","a cat"\n"b.png","a dog"\n',
    "bom.csv": '\ufeffFile_Name;Text\nA.PNG;a cat\n"b.png";"a dog"\n',
    "list.tsv": "path\tcaption\n./a.png\ta cat\nb\ta dog\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("folder", ["", "images/"])
def test_lists_of_captions_are_read(name: str, folder: str, tmp_path: Path) -> None:
    where = lay(tmp_path, {f"{folder}a.png": "", f"{folder}b.png": "", name: LISTS[name]})
    assert captions(where) == {f"{folder}a.png": "a cat", f"{folder}b.png": "a dog"}
    found = open_source(where, 8).findings
    assert found.layout == f"folder with {name}"
    assert found.captions_from == f"{name}, column caption"
    assert counts(found.unused) == ({"row of a list without an image": 1} if "gone" in LISTS[name] else {})


def test_one_of_several_captions_is_drawn_and_part_of_the_caches_key(tmp_path: Path) -> None:
    where = lay(tmp_path, {"train2017/a.png": "", "train2017/b.png": "", "annotations/c.json": json.dumps(COCO)})
    source = open_source(where, 8)
    assert {source.caption(0, np.random.default_rng(n)) for n in range(20)} == {"a cat", "a pet"}
    before = source.identity(0), source.identity(1)
    lay(tmp_path, {"annotations/c.json": json.dumps(COCO).replace("a pet", "a cow")})
    after = open_source(where, 8)
    assert (after.identity(0) == before[0], after.identity(1) == before[1]) == (False, True)


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_all_texts_of_a_json_from_which_one_is_drawn_are_part_of_the_caches_key(form: str, tmp_path: Path) -> None:
    def identities(second: str) -> list[bytes]:
        texts = json.dumps({"caption": ["a cat", second]})
        files: dict[str, bytes | str] = {"a.png": "", "a.json": texts, "b.png": "", "b.json": texts, "b.txt": "mine"}
        source = open_source(lay(tmp_path, files) if form == "folder" else tar(tmp_path / "a.tar", files), 8)
        return [source.identity(0), source.identity(1)]

    (drawn, fixed), (other, same) = identities("a pet"), identities("a cow")
    assert (drawn != other, fixed == same) == (True, True), "the text file comes first, so that no list is drawn"
    assert identities("")[0] == str(len(image_bytes())).encode() + b"\0\0\0caption\0a cat", "as earlier versions"


def test_a_class_of_a_list_next_to_text_files_is_part_of_the_caches_key(tmp_path: Path) -> None:
    def identities(label: int) -> list[bytes]:
        labels = json.dumps({"labels": [["a.png", label], ["b.png", 1]]})
        files: dict[str, bytes | str] = {"a.png": "", "a.txt": "x", "b.png": "", "b.txt": "y", "dataset.json": labels}
        source = open_source(lay(tmp_path, files), 8)
        assert source.label(0) == label
        return [source.identity(0), source.identity(1)]

    (first, same), (other, equal) = identities(0), identities(1)
    assert (first != other, same == equal) == (True, True)


NOT_LISTS = {
    "README.txt": "a.png, and then\nb.png",
    "labels.txt": "a.png,3\nb.png,4\n",
    "attributes.txt": "a.png|-1|1\nb.png|1|-1\n",
    "pairs.txt": "a.png\tb.png\n",
    "files.csv": "file_name,width\na.png,9\n",
    "urls.csv": "image,text\nhttp://x/c.png,a cow\n",
    "package.json": json.dumps({"name": "x", "description": "a program", "license": "MIT"}),
    "index.json": json.dumps({"0": ["n01", "cat"], "1": ["n02", "dog"]}),
    "instances.json": json.dumps({"images": COCO["images"], "annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]}),
    "damaged.json": '{"a.png": "x"',
    "broken.jsonl": "not json\n",
    "empty.csv": "",
    "cut.txt": b"\xff\xfea",
}


@pytest.mark.parametrize("name", NOT_LISTS)
def test_other_files_give_no_captions_and_are_counted(name: str, tmp_path: Path) -> None:
    content: Any = NOT_LISTS[name] or b"\n"
    if name == "README.txt":
        content = "Captions, and images. a.png\n"
    where = lay(tmp_path, {"a.png": "", "b.png": "", name: content})
    assert captions(where) == {"a.png": "", "b.png": ""}
    found = open_source(where, 8).findings
    assert (found.layout, sum(counts(found.unused).values())) == ("folder", 1)


def test_a_text_next_to_an_image_comes_before_a_list_and_keeps_its_caches_key(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"x/a.png": "", "x/a.txt": "mine", "y/b.png": ""}
    before = open_source(lay(tmp_path, files), 8).identity(0)
    where = lay(tmp_path, {"captions.csv": "image,caption\na.png,a cat\nb.png,a dog\n"})
    assert captions(where) == {"x/a.png": "mine", "y/b.png": "a dog"}  # before the names of the folders
    source = open_source(where, 8)
    assert source.identity(0) == before
    assert source.findings.captions_from == ".txt, else captions.csv, column caption, else names of the folders"


def test_names_that_fit_several_images_are_not_guessed(tmp_path: Path) -> None:
    where = lay(tmp_path, {"x/1.png": "", "y/1.png": "", "2.png": "", "captions.json": json.dumps(
        {"1.png": "which", "train/2.png": "a", "val/2.png": "b", "y/1.png": "sure"})})  # fmt: skip
    assert captions(where) == {"2.png": "", "x/1.png": "x", "y/1.png": "sure"}
    assert counts(open_source(where, 8).findings.unused) == {
        "row of a list without an image": 1,
        "row of a list that shares its image with another name": 2,
    }


def test_lists_of_another_split_and_a_second_list(tmp_path: Path) -> None:
    files = {"train/a.png": "", "val/b.png": ""}
    lists = {"train.csv": "image,text\na.png,a cat\n", "val.csv": "image,text\nb.png,a dog\na.png,other\n"}
    where = lay(tmp_path, {**files, **lists})
    assert captions(where) == {"train/a.png": "a cat"}
    assert counts(open_source(where, 8).findings.unused) == {"image in val/": 1, "caption in a second list": 1}
    assert captions(where, split="val") == {"val/b.png": "a dog"}


def test_options_name_columns_of_lists(tmp_path: Path) -> None:
    where = lay(
        tmp_path, {"a.png": "", "b.png": "", "list.csv": "image,text,blip,kind\na.png,t,a cat,3\nb.png,t,,4\n"}
    )
    for options in ({"caption_column": "blip", "label_column": "kind"}, {"caption_key": "blip", "label_key": "kind"}):
        assert captions(where, **options) == {"a.png": "a cat", "b.png": ""}
        assert labels(where, **options) == {"a.png": 3, "b.png": 4}
    with pytest.raises(DataError, match=r"list\.csv of .* has no column 'blop'; found caption"):
        open_source(where, 8, SourceOptions(caption_column="blop"))


def test_a_list_that_is_damaged_behind_its_beginning_is_one_line(tmp_path: Path) -> None:
    where = lay(tmp_path, {"a.png": "", "train.jsonl": '{"image": "a.png", "text": "a cat"}\n{"image": \n'})
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not valid JSON"):
        open_source(where, 8)


def test_classes_of_edm(tmp_path: Path) -> None:
    listed = {"labels": [["00000/img0.png", 7], ["00001/img1.png", 0]]}
    where = lay(tmp_path, {"00000/img0.png": "", "00001/img1.png": "", "dataset.json": json.dumps(listed)})
    assert labels(where) == {"00000/img0.png": 7, "00001/img1.png": 0}
    assert open_source(where, 8).findings.class_names == ()


def test_many_files_of_one_kind_are_not_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = lay(tmp_path, {"a.png": "", **{f"x/{n}.json": "{}" for n in range(21)}})
    monkeypatch.setattr("davae.data.captions.lists._rows", lambda *_: pytest.fail("a file was read"))
    assert counts(open_source(where, 8).findings.unused) == {".json without an image": 21}


def test_a_large_json_without_captions_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = json.dumps({"images": COCO["images"], "annotations": [{"bbox": [0] * 500}]})
    where = lay(tmp_path, {"a.png": "", "instances.json": boxes, "captions.json": json.dumps(COCO) + " " * 500})
    monkeypatch.setattr("davae.data.captions.lists.SMALL", 100)
    monkeypatch.setattr("davae.data.captions.lists.NAMES_FIRST", re.compile(b"nothing"))
    parsed: list[str] = []
    real = json.loads
    monkeypatch.setattr("davae.data.captions.lists.load_json", lambda text: parsed.append(str(text)) or real(text))
    assert captions(where) == {"a.png": "a cat"}
    assert not any("bbox" in text for text in parsed)


# -- folders of captions -----------------------------------------------------------------------------------------------

PARALLEL: dict[str, tuple[dict[str, bytes | str], dict[str, str]]] = {
    "captions": ({"images/1.png": "", "captions/1.txt": "a cat"}, {"images/1.png": "a cat"}),
    "labels": ({"images/1.png": "", "labels/1.txt": "a cat"}, {"images/1.png": "a cat"}),
    "at the root": ({"1.png": "", "txt/1.txt": "a cat"}, {"1.png": "a cat"}),
    "json": ({"img/1.png": "", "json/1.json": '{"caption": "a cat"}'}, {"img/1.png": "a cat"}),
    "case": ({"Images/A.PNG": "", "Captions/a.TXT": "a cat"}, {"Images/A.PNG": "a cat"}),
    "splits outside": (
        {
            "train/images/1.png": "",
            "train/captions/1.txt": "a cat",
            "val/images/1.png": "",
            "val/captions/1.txt": "x",
        },
        {"train/images/1.png": "a cat"},
    ),
    "splits inside": (
        {
            "images/train/1.png": "",
            "captions/train/1.txt": "a cat",
            "images/val/1.png": "",
            "captions/val/1.txt": "x",
        },
        {"images/train/1.png": "a cat"},
    ),
    "named after the folder": (
        {"train/1.png": "", "val/1.png": "", "train_captions/1.txt": "a cat", "captions_val/1.txt": "x"},
        {"train/1.png": "a cat"},
    ),
    "inside classes": (
        {"dog/1.png": "", "dog/captions/1.txt": "my dog", "cat/1.png": "", "cat/captions/1.txt": "my cat"},
        {"cat/1.png": "my cat", "dog/1.png": "my dog"},
    ),
    "two images of one stem": (
        {"i/1.png": "", "i/1.jpg": "", "captions/1.txt": "x"},
        {"i/1.jpg": "x", "i/1.png": "x"},
    ),
}


@pytest.mark.parametrize("kind", PARALLEL)
def test_captions_in_a_folder_of_their_own(kind: str, tmp_path: Path) -> None:
    files, expected = PARALLEL[kind]
    where = lay(tmp_path, files)
    assert captions(where) == expected
    unused = counts(open_source(where, 8).findings.unused)
    assert set(unused) <= {"image in val/"}


def test_a_caption_that_may_belong_to_several_images_is_counted(tmp_path: Path) -> None:
    where = lay(tmp_path, {"x/1.png": "", "y/1.png": "", "captions/1.txt": "which", "captions/2.txt": "none"})
    assert captions(where) == {"x/1.png": "x", "y/1.png": "y"}
    assert counts(open_source(where, 8).findings.unused) == {"caption without an image": 2}


def test_the_caption_next_to_an_image_stays(tmp_path: Path) -> None:
    where = lay(tmp_path, {"images/1.png": "", "images/1.txt": "mine", "captions/1.txt": "other"})
    assert captions(where) == {"images/1.png": "mine"}
    assert counts(open_source(where, 8).findings.unused) == {"caption without an image": 1}


@pytest.mark.parametrize("place", ["images/1.txt", "labels/1.txt"])
@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("0 0.5 0.5 1 1\n12 0.1 0.2 .3 1e-3\n", ""),
        ("3 0.1 0.2 0.3 0.4 0.5 0.6\n", ""),  # outlines of objects
        ("0 0.5 0.5 1 1\na cat", "0 0.5 0.5 1 1\na cat"),
        ("2 1 2 3 4", "2 1 2 3 4"),
        ("1.5", "1.5"),
    ],
)
def test_boxes_of_objects_are_not_captions(place: str, text: str, caption: str, tmp_path: Path) -> None:
    where = lay(tmp_path, {"images/1.png": "", place: text})
    assert captions(where) == {"images/1.png": caption}
    source = open_source(where, 8)
    source.caption(0)
    assert source.findings.encodings == ({} if caption else {place: "boxes of objects, not a caption"})


def test_a_key_that_only_an_option_names(tmp_path: Path) -> None:
    listed = {"a1.png": {"p": "a cat", "se": 1}, "b2.png": {"p": "a dog"}}  # DiffusionDB
    where = lay(tmp_path, {"part-1/a1.png": "", "part-1/b2.png": "", "part-1/part-1.json": json.dumps(listed)})
    assert list(captions(where).values()) == ["", ""]
    assert list(captions(where, caption_key="p").values()) == ["a cat", "a dog"]


def test_images_named_by_their_stem_as_id(tmp_path: Path) -> None:
    rows = '{"id": "abc", "prompt": "a cat"}\n{"id": "other", "prompt": "x"}\n'
    assert captions(lay(tmp_path, {"abc.png": "", "p.jsonl": rows})) == {"abc.png": "a cat"}


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_a_known_ending_comes_before_an_unknown_one(form: str, tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"1.png": "", "1.caption.txt": "mine", "1.blip2.txt": "other", "1.wd.txt": "more"}
    where = tar(tmp_path / "a.tar", files) if form == "shard" else lay(tmp_path, files)
    assert list(captions(where).values()) == ["mine"]
    assert counts(open_source(where, 8).findings.unused) == {"second caption of an image": 2}


def test_invisible_characters_alone_are_not_a_caption(tmp_path: Path) -> None:
    where = lay(tmp_path, {"a.png": "", "a.txt": "\u200b\ufeff \u200e", "b.png": "", "b.txt": "🐱\u200d👤"})
    assert captions(where) == {"a.png": "", "b.png": "🐱\u200d👤"}


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv", "plain.csv"])
def test_captions_without_quotes_may_contain_the_delimiter(name: str, delimiter: str, tmp_path: Path) -> None:
    rows = 'file_name,text,\na.png,a cat, on a sofa,,\nb.png,"a dog, in snow"\nc.png,a cow,\n'.replace(",", delimiter)
    text = rows if name != "plain.csv" else rows.partition("\n")[2]
    where = lay(tmp_path, {"a.png": "", "b.png": "", "c.png": "", name: text})
    found = captions(where)
    assert list(found.values()) == [f"a cat{delimiter} on a sofa", f"a dog{delimiter} in snow", "a cow"]
    assert (
        f"{name}: captions with the delimiter, read to the end of the row: 1" in open_source(where, 8).findings.notes
    )


@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv"])
def test_too_many_cells_that_belong_to_no_caption_are_one_line(name: str, tmp_path: Path) -> None:
    rows = "file_name,text,width\na.png,a dog,9\na.png,a cat, on a sofa,9\n"
    message = f"{name}, line 3: 4 cells in the 3 columns file_name, text, width; quote the one that contains ','"
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(lay(tmp_path, {"a.png": "", name: rows}), 8)


def test_a_row_without_a_caption_leaves_its_image_to_another_list(tmp_path: Path) -> None:
    lists = {"a.csv": "a.png,\nb.png,a dog\n", "b.csv": "a.png,a cat\n"}
    assert captions(lay(tmp_path, {"a.png": "", "b.png": "", **lists})) == {"a.png": "a cat", "b.png": "a dog"}


def test_too_many_cells_of_rows_without_an_image_do_not_matter(tmp_path: Path) -> None:
    where = lay(tmp_path, {"a.png": "", "prices.csv": "image,text,price\nshop.png,a cat, a sofa,9\n"})
    assert counts(open_source(where, 8).findings.unused) == {".csv": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a.png\ta cat, sitting, on a sofa\nb.png\ta dog\n",
        "a.png,a cat; a sofa; a house\nb.png,a dog\n",
        "image|text\na.png|a cat, a sofa\nb.png|a dog\n",
        "a.png#0\ta cat | a | sofa\nb.png#0\ta dog\n",
    ],
)
def test_a_first_caption_may_contain_another_delimiter(text: str, tmp_path: Path) -> None:
    where = lay(tmp_path, {"x/a.png": "", "y/b.png": "", "captions.txt": text})
    caption = re.split(r"\t|\||png,", text.splitlines()["image" in text], maxsplit=1)[1]
    assert captions(where) == {"x/a.png": caption, "y/b.png": "a dog"}


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85", "\x1c"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
def test_a_line_ends_only_where_files_end_it(name: str, separator: str, tmp_path: Path) -> None:
    head, delimiter = ("image,text\n", ",") if name.endswith("csv") else ("", "\t")
    rows = f"{head}a.png{delimiter}a cat{separator}on a sofa\rb.png{delimiter}a dog\r\n"
    found = captions(lay(tmp_path, {"a.png": "", "b.png": "", name: rows}))
    assert found["b.png"] == "a dog"
    assert (found["a.png"][:5], found["a.png"][-9:]) == ("a cat", "on a sofa")
