"""Clean captions and class numbers from bytes and values of any origin."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from davae.data.findings import Findings
from davae.errors import DataError, UnreadableImage
from davae.files.reading import load_json

MAX_CAPTION = 10_000  # characters; no text encoder reads a tenth of it, and tokenising megabytes takes minutes
MOST_CLASSES = 1 << 31  # numbers of classes are kept as int64, and embeddings are sized by them
MAX_FILE = 1 << 26  # bytes of a caption file or `.json` that are read

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
BOXES = re.compile(
    rf"(?:\d+(?:[ \t]+{NUMBER}){{4,}}\s*)+", re.IGNORECASE
)  # class x y width height, a line an object: YOLO
NUL_SHARE = 0.3  # of the bytes, above which text is UTF-16 without a mark


class UnreadableCaption(UnreadableImage, DataError):
    """A caption or class that cannot be read, whose image a data set leaves out.

    Its message is part of the keys of caches: a changed word makes them anew.
    """


def decode_text(data: bytes, name: str, *, cut: bool = False) -> tuple[str, str | None]:
    """Decode a text file.

    Args:
        data: its bytes.
        name: its name, for messages.
        cut: the bytes end where reading stopped, maybe inside a character.

    Returns:
        The text, and the encoding where it was guessed: neither UTF-8 nor named by a byte order mark.

    Raises:
        UnreadableCaption: a byte order mark, but bytes that do not fit it.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return _decode(data[len(mark) :], encoding, cut), None
            except UnicodeDecodeError as error:
                reason = f"{name} begins as {encoding}, but is not: {error.reason}"
                raise UnreadableCaption("damaged caption", reason) from error
    if (encoding := _utf16_by_nul(data)) is not None:
        try:
            return _decode(data, encoding, cut), f"{encoding} without a byte order mark"
        except UnicodeDecodeError:
            pass
    try:
        return _decode(data, "utf-8", cut), None
    except UnicodeDecodeError:
        pass
    try:  # surrogates as Java and Windows write them; `clean` removes lone ones
        text = data.decode("utf-8", "surrogatepass")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), None
    except UnicodeDecodeError:
        pass
    try:
        return data.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def _decode(data: bytes, encoding: str, cut: bool) -> str:
    return codecs.getincrementaldecoder(encoding)().decode(data, final=not cut)


def _utf16_by_nul(data: bytes) -> str | None:
    """Return the byte order of UTF-16 without a mark: every other byte of Latin text is NUL."""
    head = data[:4096]
    if len(head) < 4 or head.count(0) < NUL_SHARE * len(head):
        return None
    low, high = head[::2].count(0), head[1::2].count(0)
    return "utf-16-le" if high > 4 * low else "utf-16-be" if low > 4 * high else None


def clean(text: str, name: str, findings: Findings) -> str:
    """Strip a caption, unify its line ends, remove NUL and lone surrogates, and cut it.

    Args:
        text: the caption.
        name: its file, under which removals and cuts are recorded.
        findings: takes them.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip().strip("\ufeff").strip()
    removed = []
    if "\0" in text:
        text = text.replace("\0", "")
        removed.append("NUL")
    if SURROGATE.search(text):
        text = SURROGATE.sub("", text)
        removed.append("lone surrogate")
    if removed:
        findings.encodings[name] = f"{' and '.join(removed)} removed"
        text = text.strip()
    if not any(letter.isprintable() and not letter.isspace() for letter in text):
        return ""  # zero-width characters alone
    if len(text) > MAX_CAPTION:
        findings.cut[name] = len(text)
        text = text[:MAX_CAPTION].rstrip()
    return text


def caption_of_file(data: bytes, name: str, findings: Findings) -> str:
    """Return the clean text of a caption file, '' for boxes of objects, and record repairs."""
    text, guessed = decode_text(data[:MAX_FILE], name, cut=len(data) > MAX_FILE)
    if guessed is not None:
        findings.encodings[name] = guessed
    text = clean(text, name, findings)
    if "." in text[:200] and BOXES.fullmatch(text):
        findings.encodings[name] = "boxes of objects, not a caption"
        return ""
    return text


def parse_sidecar(data: bytes, name: str, findings: Findings) -> Any:
    """Parse a `.json` file in any encoding that `decode_text` knows.

    Raises:
        UnreadableCaption: damaged or too large.
    """
    if len(data) > MAX_FILE:
        raise UnreadableCaption("damaged caption", f"{name} has {len(data):,} bytes; at most {MAX_FILE:,} are read")
    text, guessed = decode_text(data, name)
    if guessed is not None:
        findings.encodings[name] = guessed
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UnreadableCaption("damaged caption", f"{name} is not valid JSON: {reason}") from error


def read_record(data: bytes, name: str, findings: Findings) -> dict[str, Any]:
    """Return the object of a `.json`.

    Raises:
        UnreadableCaption: damaged, or not an object.
    """
    record = parse_sidecar(data, name, findings)
    if not isinstance(record, dict):
        raise UnreadableCaption("damaged caption", f"{name} holds no JSON object, found {type(record).__name__}")
    return record


def as_texts(value: Any) -> list[str]:
    """Return the non-empty texts of a text, a number, or a list of both."""
    if isinstance(value, (list, tuple)):
        return [text for part in value if not isinstance(part, (list, tuple)) for text in as_texts(part)]
    if isinstance(value, bytes):
        value = decode_text(value, "a caption")[0]
    if value is None or isinstance(value, (bool, Mapping)):
        return []
    if isinstance(value, float) and not math.isfinite(value):  # how pandas writes a missing text
        return []
    text = str(value).strip()
    return [text] if text else []


def as_json(value: Any) -> str:
    """Return a value of a table that JSON has no form for, such as bytes or a date, as text."""
    return decode_text(value, "a caption")[0] if isinstance(value, bytes) else str(value)


def as_label(value: Any, name: str) -> int | None:
    """Return a class number, None where there is none.

    Raises:
        UnreadableCaption: not a whole number from 0 on.
    """
    if value is None:
        return None
    try:
        number = int(value)
        whole = not isinstance(value, float) or number == value
    except (TypeError, ValueError, OverflowError) as error:
        raise UnreadableCaption("damaged class", f"{name}: class '{str(value)[:40]}' is no whole number") from error
    if not whole or not 0 <= number < MOST_CLASSES:
        what = f"{name}: class '{str(value)[:40]}' is no whole number from 0 on"
        raise UnreadableCaption("damaged class", what if number < 0 or not whole else f"{what}, below 2^31")
    return number


GUESSES = ("text", "caption", "prompt", "captions", "TEXT")  # columns tried where none is named


def usual_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys or columns that usually hold captions, the likeliest first, in any case."""
    known = list(keys)
    exact = [guess for guess in GUESSES if guess in known]
    return list(dict.fromkeys([*exact, *(key for guess in GUESSES for key in known if key.casefold() == guess)]))


def choose(candidates: Mapping[str, Any], weights: Mapping[str, float], rng: np.random.Generator | None) -> str:
    """Return one caption of a record.

    Args:
        candidates: the record: each value a text, or a list of texts of which one is drawn evenly.
        weights: share of each key; those that the record lacks, or has empty, leave their share to the others.
        rng: draws; None takes the heaviest key and its first text.

    Returns:
        The caption, '' where the record has none.
    """
    found = {key: texts for key in weights if (texts := as_texts(candidates.get(key)))}
    if not found:
        return ""
    keys = list(found)
    key = max(keys, key=lambda k: weights[k])
    if rng is not None and len(keys) > 1:
        shares = np.asarray([weights[k] for k in keys])
        key = keys[int(rng.choice(len(keys), p=shares / shares.sum()))]
    texts = found[key]
    return texts[0] if rng is None or len(texts) == 1 else texts[int(rng.integers(len(texts)))]


def read_records(
    text: str,
    file: str,
    delimiter: str,
    captions: Collection[str],
    joined: dict[str, int],
    *,
    header: list[str] | None = None,
    quoted: bool = True,
    needed: Callable[[dict[str, Any]], bool] = bool,
) -> Iterator[dict[str, str | None]]:
    """Yield the rows by column, without loss where a caption contains the delimiter.

    Too many cells of a row that is `needed` belong to the last column, where that is one of `captions` (counted in
    `joined`); else they are a DataError.
    """
    before = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        lines, quoting = io.StringIO(text, newline=""), csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
        rows = (cells for cells in reader if any(map(str.strip, cells)))
        header = header or [cell.strip() for cell in next(rows, ())]
        while header and not header[-1]:
            header.pop()
        for cells in rows:
            record: dict[str, str | None] = {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}
            if any(map(str.strip, cells[len(header) :])) and needed(record):
                if header[-1].casefold() not in map(str.casefold, captions):
                    raise DataError(
                        f"{file}, line {reader.line_num}: {len(cells)} cells in the {len(header)} columns "
                        f"{', '.join(header)}; quote the one that contains {delimiter!r}"
                    )
                record[header[-1]] = delimiter.join(cells[len(header) - 1 :]).rstrip(delimiter)
                joined[file] = joined.get(file, 0) + 1
            yield record
    finally:
        csv.field_size_limit(before)
