"""Lists of captions: `captions.txt`, `.csv`, `.jsonl`, and the `.json` of kohya and COCO."""

from __future__ import annotations

import csv
import io
import itertools
import mmap
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from davae.data.captions.image_names import ImageNames
from davae.data.captions.metadata import Metadata
from davae.data.captions.texts import UnreadableCaption, as_texts, decode_text, read_records
from davae.data.findings import Findings, Tally, add_to
from davae.data.formats import is_image_name
from davae.errors import DataError
from davae.files.reading import load_json

ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".json")
FEW = 20  # files of one ending in a folder; more of them belong to one image each
MOST = 1 << 28  # bytes of a list that is read
SMALL = 1 << 20  # bytes of a `.json` that is parsed to see what it is
NAMES = (
    "file_name", "filename", "image_file_name", "image_name", "image_path", "image_file", "image", "img_path", "img",
    "filepath", "file_path", "path", "file", "name", "key", "id", "image_id",
)  # fmt: skip
TEXTS = ("text", "caption", "prompt", "captions", "comment", "description", "sentence", "tags")
WORTH_PARSING = [f'"{key}'.encode() for key in (*TEXTS, "labels", "raw")]
NAMES_FIRST = re.compile(rb'\{\s*"[^"\n]{1,500}\.(?:png|jpe?g|webp|bmp|gif|tiff?|avif)"\s*:', re.IGNORECASE)
COPY_NUMBER = re.compile(r"#\d+$")  # `1.jpg#0`, the first of five captions
CAPTION, LABEL = "caption", "label"  # keys of the records that are kept

Row = tuple[str, dict[str, Any]]


def read_lists(
    root: Path,
    files: Sequence[str],
    names: ImageNames,
    named: Collection[str],
    findings: Findings,
    unused: dict[str, Tally],
) -> tuple[Metadata | None, list[str]]:
    """Read the files that list images with captions or classes.

    Args:
        root: the folder.
        files: relative paths of files that belong to no image.
        names: the images.
        named: columns that options of the recipe name.
        findings: takes guessed encodings.
        unused: counts rows without an image.

    Returns:
        Records by image with the keys `caption`, `label` and `named`, None where no file is a list; and the lists.

    Raises:
        DataError: a list that is damaged behind its beginning.
    """
    records: dict[int, dict[str, Any]] = {}
    read: list[str] = []
    seen: dict[str, None] = {}
    for file in _few(files):
        at = posixpath.dirname(file)

        def find(name: str, at: str = at) -> int | None:
            found = names.find(at, name)
            return names.find_near(name) if found is None else found

        rows = _rows(root / file, file, named, find, findings)
        if not rows or (own := _by_image(rows, file, find, names.count, unused)) is None:
            continue
        read.append(file)
        for place, record in own.items():
            seen |= dict.fromkeys(record)
            if place in records and records[place] != record:
                add_to(unused, "caption in a second list", f"{file}: {names.paths[place]}")
            records.setdefault(place, record)
    return (Metadata(records, names.count, seen) if read else None), read


def _few(files: Sequence[str]) -> Iterator[str]:
    """Yield the files of which a folder has few, as lists are."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        alike[posixpath.dirname(file), posixpath.splitext(file)[1].lower()].append(file)
    for (_, ending), group in sorted(alike.items()):
        if ending in ENDINGS and len(group) <= FEW:
            yield from sorted(group)


def _by_image(
    rows: list[Row], file: str, find: Callable[[str], int | None], count: int, unused: dict[str, Tally]
) -> dict[int, dict[str, Any]] | None:
    """Return the records of images, with all captions of each, or None where no row fits."""
    place_of = {name: find(name) for name in dict.fromkeys(name for name, _ in rows)}
    found = Counter(place for place in place_of.values() if place is not None)
    if not found:
        return None
    records: dict[int, dict[str, Any]] = {}
    for name, record in rows:
        place = place_of[name]
        if place is None or found[place] > 1:  # `train/1.png` and `val/1.png` of a list where only `1.png` is there
            why = "without an image" if place is None else "that shares its image with another name"
            add_to(unused, f"row of a list {why}", f"{file}: {name}")
        elif place < count:
            records[place] = _merged(records[place], record) if place in records else record
    return records


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Join two rows: texts become a list, of other values the first stays."""
    joined = {**second, **first}
    for key, value in second.items():
        if isinstance(value, (str, list)) and joined[key] != value:
            joined[key] = list(dict.fromkeys([*as_texts(joined[key]), *as_texts(value)]))
    return joined


def _rows(
    path: Path, file: str, named: Collection[str], find: Callable[[str], int | None], findings: Findings
) -> list[Row] | None:
    """Return (name of an image, record) of each row, None for a file that lists no images."""
    try:
        size = path.stat().st_size
        if not 0 < size <= MOST:
            return None
        ending = path.suffix.lower()
        if ending == ".json" and not _may_list(path, size):
            return None
        text, guessed = decode_text(path.read_bytes(), file)
    except (OSError, UnreadableCaption):
        return None  # it is counted as a file that is not used
    text = text.removeprefix("\ufeff")
    if ending == ".json":
        rows = _of_json(text, named, find)
    elif ending == ".jsonl":
        rows = _of_json_lines(text, path, named)
    else:
        rows = _of_table(text, file, named, find, findings)
    if rows and guessed is not None:
        findings.encodings[file] = guessed
    return rows


def _may_list(path: Path, size: int) -> bool:
    """Return whether a `.json` is worth parsing, which COCO's boxes and masks are not."""
    if size <= SMALL:
        return True
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(key) >= 0 for key in WORTH_PARSING) or NAMES_FIRST.search(data[:4096]) is not None


def _record(row: Mapping[str, Any], named: Collection[str]) -> tuple[str | None, dict[str, Any]]:
    """Return a row's image name and the values to keep, with keys in any case."""
    keys = {str(key).strip().casefold(): key for key in reversed(list(row))}
    name = next((row[keys[key]] for key in NAMES if key in keys and isinstance(row[keys[key]], str)), None)
    record = {key: row[key] for key in named if row.get(key) is not None}
    text = next((found for key in TEXTS if key in keys and (found := _texts(key, row[keys[key]]))), None)
    if text is None and isinstance(row.get("sentences"), list):  # Karpathy's splits
        text = [one["raw"] for one in row["sentences"] if isinstance(one, dict) and as_texts(one.get("raw"))]
    if text:
        record.setdefault(CAPTION, text)
    return name, record


def _texts(key: str, value: Any) -> list[str]:
    """Return the captions of a cell, with all tags of a list as one caption."""
    found = as_texts(value)
    return [", ".join(found)] if key == "tags" and found else found


def _listed(rows: Sequence[Any], named: Collection[str]) -> list[Row] | None:
    """Return the rows of a list of objects, None where none has a name and a caption."""
    pairs = [_record(row, named) for row in rows if isinstance(row, dict)]
    found = [(_bare(name), record) for name, record in pairs if name]
    return found if any(record for _, record in found) else None


def _of_json(text: str, named: Collection[str], find: Callable[[str], int | None]) -> list[Row] | None:
    try:
        value = load_json(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
            return _of_coco(value["images"], value["annotations"])
        if isinstance(value.get("labels"), list):  # `dataset.json` of EDM and StyleGAN
            pairs = [pair for pair in value["labels"] if isinstance(pair, list) and len(pair) == 2]
            return [(name, {LABEL: label}) for name, label in pairs if isinstance(name, str) and type(label) is int]
        inner = next(
            (value[key] for key in ("data", "annotations", "images") if isinstance(value.get(key), list)), None
        )
        if inner is not None:
            return _listed(inner, named)
        return _of_object(value, named, find)
    if isinstance(value, list):
        if value and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value):
            return [(name, {CAPTION: texts}) for name, text in value if (texts := as_texts(text))]
        return _listed(value, named)
    return None


def _of_coco(images: list[Any], annotations: list[Any]) -> list[Row] | None:
    """Return a row per caption: annotations name images by number."""
    name_of = {image.get("id"): image.get("file_name") for image in images if isinstance(image, dict)}
    texts: dict[str, list[str]] = {name: [] for name in name_of.values() if isinstance(name, str)}
    for note in annotations:
        if isinstance(note, dict) and (name := name_of.get(note.get("image_id"))) in texts:
            texts[str(name)] += as_texts(note.get("caption"))
    if not any(texts.values()):
        return None
    return [(name, {CAPTION: found}) for name, found in texts.items() if found]


def _of_object(value: dict[str, Any], named: Collection[str], find: Callable[[str], int | None]) -> list[Row] | None:
    """Return the rows of an object with a key per image: `{"a.png": "a cat"}`, as kohya's."""
    rows: list[Row] = []
    for name, content in value.items():
        if isinstance(content, dict):
            record = _record(content, named)[1]
        else:
            record = {CAPTION: texts} if (texts := as_texts(content)) else {}
        if record:
            rows.append((name, record))
    sure = any(is_image_name(name) for name, _ in rows)
    return rows if sure or 2 * sum(find(name) is not None for name, _ in rows) > len(value) else None


def _of_json_lines(text: str, path: Path, named: Collection[str]) -> list[Row] | None:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip().strip("\0"):
            continue
        try:
            row = load_json(line)
        except (ValueError, RecursionError) as error:
            if not rows:
                return None
            raise DataError(f"{path}, line {number}: not valid JSON ({error}); correct or remove the line") from error
        if not rows and (not isinstance(row, dict) or not all(_record(row, named))):
            return None
        rows.append(row)
    return _listed(rows, named)


def _of_table(
    text: str, file: str, named: Collection[str], find: Callable[[str], int | None], findings: Findings
) -> list[Row] | None:
    """Return the rows of a table that has a header, or names of images in the first column."""
    lines = itertools.islice(io.StringIO(text, newline=""), FEW)  # `splitlines` would cut at U+2028, too
    first = next((line for line in lines if line.strip()), "")[:10_000]

    def known(record: Mapping[str, Any]) -> bool:
        return find(_bare(_record(record, named)[0] or "")) is not None

    for delimiter in "\t,;|":
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        folded = {cell.casefold() for cell in cells}
        titled = not folded.isdisjoint(NAMES) and not folded.isdisjoint((*TEXTS, *map(str.casefold, named)))
        if delimiter in first and (titled or (is_image_name(_bare(cells[0])) and known({"image": cells[0]}))):
            break
    else:
        return None
    header = None if titled else ["image", CAPTION]
    options: Any = {"header": header, "quoted": delimiter in ",;", "needed": known}
    try:
        rows = list(read_records(text, file, delimiter, {*named, *TEXTS}, findings.joined, **options))
    except csv.Error:
        return None
    rows = [{key: value and value.strip() for key, value in row.items()} for row in rows if titled or row[CAPTION]]
    return _listed(rows, named) if titled or any(_is_text(row[CAPTION] or "") for row in rows[:FEW]) else None


def _bare(name: str) -> str:
    """Return a name of an image without the number of its caption."""
    return COPY_NUMBER.sub("", name.strip())


def _is_text(caption: str) -> bool:
    """Return whether a second column contains words, not classes, attributes or image names."""
    return any(letter.isalpha() for letter in caption) and not is_image_name(caption)
