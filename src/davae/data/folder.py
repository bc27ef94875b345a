"""Images in a folder and below, with captions, classes and metadata next to them."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from davae.data.captions.file_names import Kind, Matched, is_hidden, match, stem
from davae.data.captions.image_names import ImageNames
from davae.data.captions.lists import CAPTION, LABEL, read_lists
from davae.data.captions.metadata import read_metadata_files
from davae.data.captions.parallel_folders import Owner, assign_parallel, part_folders
from davae.data.captions.sidecars import Sidecars
from davae.data.captions.texts import UnreadableCaption, as_label, as_texts, choose, clean, usual_keys
from davae.data.class_folders import captions_of_classes, classes_of_folders, order_note
from davae.data.decoding import decode_image, disk_fault, header_size, of_the_disk
from davae.data.findings import Findings, Tally, add_to, printable
from davae.data.formats import image_endings, is_image_name
from davae.data.options import TABLE_OPTIONS, SourceOptions
from davae.data.splits import choose_split, split_note
from davae.errors import DataError


def walk(root: Path, unused: dict[str, Tally]) -> dict[str, list[str]]:
    """List a folder and all below it.

    Links to folders are followed after all real folders, each folder is read once, so loops end.

    Args:
        root: the folder.
        unused: counts what is passed over; added to.

    Returns:
        Relative folder ('' the root) -> names of its files, sorted.
    """
    found: dict[str, list[str]] = {}
    real, links = deque([""]), deque[str]()
    above = [os.stat(folder) for folder in Path(os.path.realpath(root)).parents]
    seen = {(status.st_dev, status.st_ino) for status in above}  # a link to one of them is a loop, too
    while real or links:
        relative = real.popleft() if real else links.popleft()
        path = os.path.join(root, relative)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            add_to(unused, "link to a folder that is read already", relative)
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            add_to(unused, "folder that cannot be read", relative)
            continue
        found[relative] = []
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            linked = entry.is_symlink()  # of anything else the listing knows the kind: no further call per file
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                if is_hidden(entry.name):
                    add_to(unused, "hidden or thumbnail folder", name)
                else:
                    (links if linked else real).append(name)
            elif is_hidden(entry.name):
                add_to(unused, "hidden file", name)
            elif (os.path.isfile(entry.path) if linked else entry.is_file()) or (
                linked and is_image_name(entry.name)
            ):
                found[relative].append(entry.name)
            else:
                add_to(unused, "broken link" if linked else "not a regular file", name)
    return found


class FolderSource:
    """Images under a folder, with sidecar files, metadata files, and sub-folders as classes.

    Args:
        folder: the root.
        options: the recipe's section `data`.

    Raises:
        DataError: no images, splits of which the wanted one is missing, or damaged metadata.
    """

    def __init__(self, folder: Path, options: SourceOptions):
        self.folder, self.options = folder, options
        unused: dict[str, Tally] = {}
        matched = {at: match(names, f"{at}/" if at else "", unused) for at, names in walk(folder, unused).items()}
        for at in part_folders({at: part.images for at, part in matched.items() if part.images}):
            for name in matched[at].images:
                add_to(unused, "other part of a sample", _join(at, name))
            matched[at].images.clear()
        chosen = choose_split([at for at, part in matched.items() if part.images], options.split, str(folder))
        elsewhere = {_join(at, name): why for at, why in chosen.left.items() for name in matched[at].images}
        for name, why in elsewhere.items():
            add_to(unused, f"image {why}", name)
        owner = {_join(at, name): (at, name) for at in chosen.read for name in matched[at].images}
        self.names = sorted(owner)
        of_folder = classes_of_folders(chosen.read)
        self.classes = {name: number for number, name in enumerate(sorted(set(of_folder.values())))}
        self._class_of = of_folder
        self._caption_of, self._numbered = captions_of_classes(self.classes)
        self._former = _former_classes(self.names)
        parallel, used = assign_parallel(matched)
        self._near = FolderSidecars(self.names, owner, matched, parallel)
        self.findings = Findings("", unused=unused)
        self._read_tables(matched, used, elsewhere, chosen.read)
        if not self.names:
            raise DataError(f"folder {folder} holds no images ({_what_is_there(folder, unused)})")
        own = SourceOptions() if self._options_taken else options
        own.refuse(f"the folder {folder}", TABLE_OPTIONS)
        self.sidecars = Sidecars(own, self, self.findings, str(folder))
        self._describe(chosen.split, of_folder)

    def _read_tables(
        self,
        matched: Mapping[str, Matched],
        used: dict[str, set[str]],
        elsewhere: Collection[str],
        read: Collection[str],
    ) -> None:
        """Read metadata files and lists of captions, count all other files, and set the layout."""
        o, unused = self.options, self.findings.unused
        assert isinstance(unused, dict)
        self._weights = dict(o.record_keys) or ({o.caption_column: 1.0} if o.caption_column else {})
        self._label_column = o.label_key or o.label_column
        named = [*self._weights, *([self._label_column] if self._label_column else [])]
        images = ImageNames(os.path.abspath(self.folder), self.names, elsewhere)
        files = sorted(_join(at, name) for at, part in matched.items() for name in part.metadata)
        duplicates: dict[str, Tally] = {}
        self.metadata = None
        if files and self.names:
            self.metadata = read_metadata_files(self.folder, files, images, named, self.findings, unused, duplicates)
        rest = [
            _join(at, name)
            for at, part in matched.items()
            for name in (*part.others, *(name for name, _, kind in part.loose if kind != "cls"))
            if name not in used.get(at, ())
        ]
        self.listed, lists = read_lists(self.folder, rest, images, named, self.findings, unused)
        for file in lists:
            used[file.rpartition("/")[0]].add(file.rpartition("/")[2])
        for at, part in matched.items():
            part.count_rest(f"{at}/" if at else "", unused, used.get(at, ()))
        seen = [column for table in (self.metadata, self.listed) if table is not None for column in table.seen]
        missing = next((column for column in named if column not in seen), None)
        self._options_taken = self.metadata is not None or bool(named and missing is None)
        if missing is not None and (self.metadata is not None or (self.listed is not None and o.names_columns)):
            shown = (files or lists)[0]
            raise DataError(f"data: {shown} of {self.folder} has no column '{missing}'; found {', '.join(seen)}")
        shown = [name for name in files if name.rpartition("/")[0] in read] or files or lists
        layout = f"folder with {printable(shown[0])}" if shown else "class folders" if self._class_of else "folder"
        self._lists = ", ".join(printable(name) for name in lists[:3])
        labelled = self.listed is not None and LABEL in self.listed.columns
        names = () if labelled else tuple(printable(name) for name in self.classes)
        self.findings = replace(self.findings, layout=layout, duplicates=duplicates, class_names=names)

    def _describe(self, split: bool, of_folder: dict[str, str]) -> None:
        """Complete the findings: the origin of captions, and notes on decisions."""
        what = "captions with the delimiter, read to the end of the row"
        notes = [f"{printable(file)}: {what}: {count:,}" for file, count in self.findings.joined.items()]
        parts = [p for p in (self.sidecars.origin(self._near.counts),) if p != "none"]
        if self.metadata is not None:
            columns = [*self._weights] or usual_keys(self.metadata.columns)
            parts.insert(0, "metadata, column " + ", ".join(columns) if columns else "metadata without captions")
        if self.listed is not None and (texts := self.listed.columns - {LABEL}):
            parts.append(f"{self._lists}, column {', '.join(sorted(texts))}")
        if self.metadata is None and any(self._caption_of.values()):
            parts.append("names of the folders")
        inside = (at for at in sorted(of_folder) if any(above.as_posix() in of_folder for above in Path(at).parents))
        if (inner := next(inside, None)) is not None:
            notes.append(f"folders inside a class are classes of their own, as {printable(inner)}")
        if self.metadata is None or not self.metadata.columns:
            notes += self.sidecars.notes
        if (note := order_note(self.classes)) is not None:
            notes.append(note)
        if split:
            notes.append(split_note(self.options.split))
        folders = {at for at in (name.rpartition("/")[0] for name in self.names) if at}
        if folders and not of_folder:
            shown = ", ".join(printable(at) for at in sorted(folders)[:3])
            notes.append(f"the names of the folders ({shown}) are neither captions nor classes")
        elif self._numbered:
            first = printable(next(iter(self.classes)))
            notes.append(
                f"numbers before the names of the folders ({first}) are left out of captions; repeats are not applied"
            )
        elif of_folder and not any(self._caption_of.values()):
            notes.append("the folders are numbered pieces: their names are not captions")
        self.findings = replace(self.findings, captions_from=", else ".join(parts) or "none", notes=tuple(notes))
        self.sidecars.findings = self.findings

    def __len__(self) -> int:
        return len(self.names)

    def _path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def sidecar(self, index: int, kind: Kind, limit: int) -> bytes | None:
        name = self._near.name(index, kind)
        if name is None:
            return None
        try:
            with (self.folder / name).open("rb") as stream:
                return stream.read(limit)
        except OSError as error:
            if of_the_disk(error):
                raise disk_fault(self.folder / name, error) from error
            raise UnreadableCaption(
                "damaged caption", f"{printable(name)} cannot be read: {error.strerror or error}"
            ) from error

    def sidecar_name(self, index: int, kind: Kind) -> str:
        return printable(self._near.name(index, kind) or self.names[index])

    def key(self, index: int) -> str:
        return printable(self.names[index])

    def size(self, index: int) -> tuple[int, int]:
        return header_size(self._path(index), self.options.max_pixels, self.options.float_pixels)

    def _class(self, index: int) -> str | None:
        return self._class_of.get(self.names[index].rpartition("/")[0])

    def stamp(self, index: int) -> bytes:
        return str(self._bytes(index)).encode()

    def length(self, index: int) -> int:
        return max(0, self._bytes(index))

    def _bytes(self, index: int) -> int:
        """Return the size of an image's file, -1 where there is none."""
        try:
            status = os.stat(os.path.join(self.folder, self.names[index]))
        except OSError:
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def parts(self, index: int, stretches: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        with self._path(index).open("rb", buffering=0) as stream:
            for offset, size in stretches:
                stream.seek(offset)
                yield stream.read(size)

    def identity(self, index: int) -> bytes:
        """Return the file's size and what belongs to the image, as earlier versions did."""
        with self.sidecars.reading_once():
            parts = [str(self.length(index)).encode() + b"\0" + self.sidecars.identity(index)]
            folder = Path(self.names[index]).parent.name if "/" in self.names[index] else ""
            try:
                caption, label = self.caption(index), self.label(index)
            except UnreadableCaption as error:
                return b"\0".join([*parts, str(error).encode()])
            parts.append(self.sidecars.changed_caption(index, folder.replace("_", " "), caption))
            listed = (self.listed.record(index) if self.listed is not None else None) or {}
            if listed and self.sidecars.caption_or_fault(index):  # only the class of the list is used
                listed = {key: value for key, value in listed.items() if key == (self._label_column or LABEL)}
        if listed:
            parts.append(b"\0list" + json.dumps(listed).encode())
        if self.metadata is not None:
            parts.append(json.dumps(self.metadata.record(index)).encode())
        elif self._class(index) is not None or folder:
            former = self._former.get(folder)
            parts.append(b"" if label == former or self._near.name(index, "cls") else f"\0class {label}".encode())
        return b"".join(parts)

    def label(self, index: int) -> int | None:
        own = self.sidecars.label(index)
        if own is None and self.metadata is not None and self._label_column is not None:
            own = as_label((self.metadata.record(index) or {}).get(self._label_column), self.key(index))
        if own is None and self.listed is not None:
            own = as_label((self.listed.record(index) or {}).get(self._label_column or LABEL), self.key(index))
        if own is not None:
            return own
        name = self._class(index)
        return None if name is None else self.classes[name]

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        text: str | None = None
        if self.metadata is not None and (record := self.metadata.record(index)) is not None:
            weights = self._weights or next(({key: 1.0} for key in usual_keys(record) if as_texts(record[key])), {})
            text = clean(choose(record, weights, rng), self.key(index), self.findings)
        if not text:
            text = self.sidecars.caption(index, rng)
        if not text and self.listed is not None and (record := self.listed.record(index)) is not None:
            weights = self._weights if self._weights.keys() & set(self.listed.seen) else {CAPTION: 1.0}
            text = clean(choose(record, weights, rng), self.key(index), self.findings) or text
        if text is None and self.metadata is None and (name := self._class(index)) is not None:
            text = clean(printable(self._caption_of[name] or ""), self.key(index), self.findings)
        return text or ""

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        text = self.caption(index, rng)
        options = self.options
        return decode_image(self._path(index), options.background, options.max_pixels, options.float_pixels), text


class FolderSidecars:
    """Names of the files next to each image, kept as patterns in a few bytes an image.

    Args:
        names: relative paths of the images, in order.
        owner: relative path -> folder and file name.
        matched: folder -> its files.
        parallel: folder and file name of an image -> files in a folder of captions.
    """

    def __init__(
        self,
        names: Sequence[str],
        owner: dict[str, tuple[str, str]],
        matched: Mapping[str, Matched],
        parallel: Mapping[Owner, Mapping[Kind, str]],
    ):
        self.names = names
        self.counts: dict[str, int] = Counter()
        self._patterns: list[dict[Kind, tuple[str, str]]] = []  # folder of the file, and its ending
        self._odd: dict[tuple[int, Kind], str] = {}
        known: dict[tuple[tuple[Kind, tuple[str, str]], ...], dict[Kind, tuple[str, str]]] = {}
        for index, path in enumerate(names):
            at, name = owner[path]
            pattern: dict[Kind, tuple[str, str]] = {}
            near: dict[Kind, str] = {
                kind: _join(at, file) for kind, file in matched[at].sidecars.get(name, {}).items()
            }
            found: dict[Kind, str] = {**parallel.get(owner[path], {}), **near}
            for kind, file in found.items():
                self.counts[kind] += 1
                folder, _, own = file.rpartition("/")
                if own.startswith(f"{stem(name)}."):
                    pattern[kind] = folder, own[len(stem(name)) :]
                else:
                    self._odd[index, kind] = file
            self._patterns.append(known.setdefault(tuple(pattern.items()), pattern))

    def name(self, index: int, kind: Kind) -> str | None:
        """Return the relative path of a file next to an image, None where there is none."""
        if (odd := self._odd.get((index, kind))) is not None:
            return odd
        if (found := self._patterns[index].get(kind)) is None:
            return None
        return _join(found[0], stem(self.names[index].rpartition("/")[2]) + found[1])


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _former_classes(names: Sequence[str]) -> dict[str, int]:
    """Return the class numbers of earlier versions, which are part of the keys of old caches."""
    leaves = sorted({Path(name).parent.name for name in names if "/" in name})
    return {name: number for number, name in enumerate(leaves)}


def _what_is_there(root: Path, unused: dict[str, Tally]) -> str:
    found = ", ".join(f"{tally.count} {kind}, e.g. {tally.names[0]}" for kind, tally in unused.items())
    if ".parquet" in unused:  # without the column of images
        name = unused[".parquet"].names[0]
        found += f"; name the files in data.source, as {root / Path(name).parent}/*.parquet, and data.image_column"
    return f"found {found}" if found else ", ".join(sorted(image_endings()))
