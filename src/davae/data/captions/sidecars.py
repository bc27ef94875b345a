"""Caption and class of an image from its sidecars: `.txt` and variants, `.json`, `.cls`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from davae.data.captions.file_names import Kind
from davae.data.captions.texts import (
    MAX_FILE,
    UnreadableCaption,
    as_label,
    as_texts,
    caption_of_file,
    choose,
    clean,
    decode_text,
    parse_sidecar,
    read_record,
    usual_keys,
)
from davae.data.findings import Findings
from davae.data.options import SourceOptions
from davae.errors import DataError

SHOWN = 12  # keys in a note
TRIED = 100  # images looked at before a key of the `.json` counts as found nowhere
LIMITS: dict[Kind, int] = {"txt": MAX_FILE + 1, "json": MAX_FILE + 1, "cls": 1024}


class SidecarFiles(Protocol):
    """Access to the files next to an image."""

    def __len__(self) -> int: ...

    def sidecar(self, index: int, kind: Kind, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file, None where there is none."""
        ...

    def sidecar_name(self, index: int, kind: Kind) -> str: ...


class Sidecars:
    """Read captions and classes by the options of a recipe.

    Args:
        options: the recipe's section `data`.
        files: access to the files.
        findings: takes guessed encodings, repairs and cuts.
        name: the source, for messages.
    """

    def __init__(self, options: SourceOptions, files: SidecarFiles, findings: Findings, name: str):
        self.options, self.files, self.findings, self.name = options, files, findings, name
        self.weights = options.record_keys
        self.json_key: str | None = None
        self.notes: tuple[str, ...] = ()
        self._read: dict[tuple[int, Kind], bytes | None] | None = None
        self._check_keys()
        if not self.weights:
            self.json_key = self._find_key()

    def _check_keys(self) -> None:
        """DataError when none of the first images has a key that an option names."""
        keys = {**self.weights, **({self.options.label_key: 1.0} if self.options.label_key else {})}
        if not keys:
            return
        seen: set[str] = set()
        for index in range(min(len(self.files), TRIED)):
            try:
                seen |= self.record(index).keys()
            except UnreadableCaption:  # its image is left out by name when it is read
                continue
        for key in keys:
            if key not in seen:
                has = ", ".join(sorted(seen)[:12]) or "no .json at all"
                raise DataError(
                    f"data: no .json among the first images of {self.name} has the key '{key}'; found {has}"
                )

    def _find_key(self) -> str | None:
        """Return the usual caption key that a `.json` of images spread over the set has.

        A `.json` without captions (masks of SA-1B) has up to a megabyte: it is not read again for every image.
        """
        count, seen = len(self.files), dict[str, None]()
        for index in sorted({place * count // min(count, TRIED) for place in range(min(count, TRIED))}):
            try:
                record = self._guessed_record(index)
            except UnreadableCaption:
                continue
            for key in usual_keys(record):
                if as_texts(record[key]):
                    return key
            seen |= dict.fromkeys(record)
        if seen:
            shown = ", ".join(list(seen)[:SHOWN]) + (", ..." if len(seen) > SHOWN else "")
            self.notes = (f"no .json has a usual key of captions; found {shown}; data.caption_key names one",)
        return None

    def _bytes(self, index: int, kind: Kind) -> bytes | None:
        if self._read is None:
            return self.files.sidecar(index, kind, LIMITS[kind])
        if (index, kind) not in self._read:
            self._read[index, kind] = self.files.sidecar(index, kind, LIMITS[kind])
        return self._read[index, kind]

    @contextmanager
    def reading_once(self) -> Iterator[None]:
        """Keep what is read until the end of the block, so that each file is read once."""
        self._read = {}
        try:
            yield
        finally:
            self._read = None

    def _guessed_record(self, index: int) -> dict[str, Any]:
        """Return the object of the `.json`, in which a bare text or list of texts is the caption."""
        if (data := self._bytes(index, "json")) is None:
            return {}
        value = parse_sidecar(data, self.files.sidecar_name(index, "json"), self.findings)
        if isinstance(value, dict):
            return value
        return {"caption": value} if isinstance(value, (str, list)) else {}

    def record(self, index: int) -> dict[str, Any]:
        """Return the object of an image's `.json`, with its `.txt` under the key `txt`."""
        data = self._bytes(index, "json")
        name = self.files.sidecar_name(index, "json")
        record = {} if data is None else read_record(data, name, self.findings)
        if "txt" in self.weights and (text := self._bytes(index, "txt")) is not None:
            record["txt"] = caption_of_file(text, self.files.sidecar_name(index, "txt"), self.findings)
        return record

    def caption(self, index: int, rng: np.random.Generator | None) -> str | None:
        """Return the caption, None where no file next to the image has one.

        Raises:
            UnreadableCaption: a damaged file.
        """
        if self.weights:
            text = choose(self.record(index), self.weights, rng)
            return clean(text, self.files.sidecar_name(index, "json"), self.findings)
        found = self._of_txt(index)
        if not found and (texts := self._of_json(index)):
            found = clean(choose({"": texts}, {"": 1.0}, rng), self.files.sidecar_name(index, "json"), self.findings)
        return found

    def _of_txt(self, index: int) -> str | None:
        if (data := self._bytes(index, "txt")) is None:
            return None
        return caption_of_file(data, self.files.sidecar_name(index, "txt"), self.findings)

    def _of_json(self, index: int) -> list[str]:
        """Return the texts of a `.json` of which one is drawn, where no option names its key."""
        if self.json_key is None:
            return []
        record = self._guessed_record(index)
        return next(
            (found for key in (self.json_key, *usual_keys(record)) if (found := as_texts(record.get(key)))), []
        )

    def label(self, index: int) -> int | None:
        """Return the class number, None where there is none.

        Raises:
            UnreadableCaption: not a whole number.
        """
        name = self.files.sidecar_name(index, "cls")
        if self.options.label_key is not None:
            return as_label(self.record(index).get(self.options.label_key), self.files.sidecar_name(index, "json"))
        data = self._bytes(index, "cls")
        return None if data is None else as_label(decode_text(data, name)[0].strip().strip("\ufeff"), name)

    def caption_or_fault(self, index: int) -> str:
        """Return the plain caption, or for a damaged one what is wrong with it."""
        try:
            return self.caption(index, None) or ""
        except UnreadableCaption as error:
            return str(error)

    def identity(self, index: int) -> bytes:
        """Return bytes that change with the caption or class, equal to those of earlier versions."""
        kinds: list[Kind] = ["json"] if self.weights or self.options.label_key else []
        if not self.weights or "txt" in self.weights:
            kinds.append("txt")
        return b"\0".join(self._bytes(index, kind) or b"" for kind in (*kinds, "cls"))

    def changed_caption(self, index: int, before: str, caption: str) -> bytes:
        """Return what `identity` lacks: a caption once misread, and texts that are drawn.

        Args:
            index: the image.
            before: what it would have had without a `.txt`.
            caption: what it has.
        """
        if self.weights:
            return b""
        data = self._bytes(index, "txt")
        old = before if data is None else data.decode("utf-8", "replace").strip()
        try:
            drawn = [] if self._of_txt(index) else self._of_json(index)
        except UnreadableCaption:
            drawn = []
        every = b"\0texts\0" + json.dumps(drawn).encode() if len(drawn) > 1 else b""
        return (b"" if old == caption else b"\0caption\0" + caption.encode()) + every

    def origin(self, counts: dict[str, int]) -> str:
        """Describe where captions come from.

        Args:
            counts: how many images have a file of each kind.
        """
        if self.weights:
            return f".json, key{'s' if len(self.weights) > 1 else ''} " + ", ".join(self.weights)
        parts = [".txt"] if counts.get("txt") else []
        if self.json_key is not None:
            parts.append(f".json, key {self.json_key}")
        return ", else ".join(parts) or "none"
