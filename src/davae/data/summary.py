"""Summary of a data source: what was found, what trains, and what is not used and why."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from davae.data.findings import Findings, Tally, add_to
from davae.data.images import ImageSource, by_kind, spread_indices
from davae.errors import UnreadableImage

READ = 100_000  # captions and classes that a summary reads; of a larger set it reads this many, spread over all
NAMED = 3  # names shown of each reason
EXAMPLES = 20
EQUAL = "image whose file is there under another name, too; both are used"
CLIP_TOKENS = 77
WORD = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_")  # each is at least one of CLIP's tokens
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {10: "\\n", 13: "\\r", 9: "\\t"}
MARGIN = 4  # tokens that a tokenizer may add to those that stand for characters


@dataclass(frozen=True)
class TokenLimit:
    """Limit of one text encoder.

    Attributes:
        name: its component in the pipeline.
        tokens: tokens that it reads of a caption, special ones included.
        count: captions -> tokens of each before anything is cut.
    """

    name: str
    tokens: int
    count: Callable[[list[str]], list[int]]


def count_words(captions: list[str]) -> list[int]:
    """Return the least number of CLIP's tokens of each caption: words, digits, marks, and two."""
    return [len(WORD.findall(caption)) + 2 for caption in captions]


CLIP_AT_LEAST = TokenLimit("CLIP", CLIP_TOKENS, count_words)  # where no model is known


@dataclass
class CaptionFacts:
    """Counts over the captions that were read."""

    present: int = 0
    empty: int = 0
    distinct: int = 0
    cut: int = 0  # by one text encoder or more
    cut_by: dict[str, dict[str, int]] = field(default_factory=dict)  # encoder -> tokens, captions
    several_lines: int = 0
    longest: int = 0  # characters
    longest_name: str = ""
    commonest: str = ""
    commonest_count: int = 0
    damaged: dict[int, str] = field(default_factory=dict)  # image whose caption cannot be read -> why


def read_captions(source: ImageSource, indices: Sequence[int], limits: Sequence[TokenLimit]) -> CaptionFacts:
    """Count captions: distinct ones by a hash of 8 bytes, cut ones by each tokenizer.

    Args:
        source: the images.
        indices: those whose captions are counted.
        limits: of the text encoders.
    """
    facts = CaptionFacts(cut_by={limit.name: {"tokens": limit.tokens, "captions": 0} for limit in limits})
    seen: Counter[bytes] = Counter()
    first: dict[bytes, int] = {}
    for index in indices:
        try:
            text = source.caption(index).strip()
        except UnreadableImage as error:
            facts.damaged[index] = str(error)
            continue
        if not text:
            facts.empty += 1
            continue
        facts.present += 1
        facts.several_lines += "\n" in text
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        seen[digest] += 1
        first.setdefault(digest, index)
        if len(text) > facts.longest:
            facts.longest, facts.longest_name = len(text), source.key(index)
        # a token covers one byte or more: most captions need no tokenizer
        long = [limit for limit in limits if len(text.encode("utf-8", "replace")) + MARGIN > limit.tokens]
        over = [limit for limit in long if limit.count([text])[0] > limit.tokens]
        for limit in over:
            facts.cut_by[limit.name]["captions"] += 1
        facts.cut += bool(over)
    facts.distinct = len(seen)
    if seen:
        digest, facts.commonest_count = seen.most_common(1)[0]
        facts.commonest = source.caption(first[digest]).strip()
    return facts


@dataclass(frozen=True)
class Summary:
    """Facts about a source as training takes it, written to `data.json`.

    Attributes:
        found: images in the source, or the part that data.limit chooses.
        images: those that can be used; captions, classes and sizes are theirs.
        read: images whose caption and class were read: all, or a part spread over a very large set.
        labels: different class numbers, rising; -1 where an image has none.
        sizes: smallest, median, largest -> (width, height).
        buckets: `1024x1024` -> images.
        left_out: reason -> names.
        partial: what of a remote source was looked at; empty where all was.
    """

    source: str
    layout: str
    captions_from: str
    found: int
    images: int
    read: int
    captions: CaptionFacts
    classes: dict[str, int]
    labels: list[int]
    sizes: dict[str, tuple[int, int]]
    buckets: dict[str, int]
    left_out: dict[str, list[str]]
    unused: dict[str, Tally]
    duplicates: dict[str, Tally]
    encodings: dict[str, list[str]]
    notes: tuple[str, ...]
    examples: list[dict[str, Any]]
    seconds: float
    partial: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values under the keys that DESIGN 10 names, and more."""
        captions = asdict(self.captions)
        return {
            "source": self.source,
            "layout": self.layout,
            "images": self.images,
            "images_found": self.found,
            "captions": self.captions.present,
            "captions_distinct": self.captions.distinct,
            "captions_empty": self.captions.empty,
            "captions_cut": self.captions.cut,
            "captions_cut_by": self.captions.cut_by,
            "captions_from": self.captions_from,
            "captions_read": self.read,
            "caption_longest": {"characters": self.captions.longest, "name": self.captions.longest_name},
            "caption_commonest": {"caption": captions["commonest"], "images": captions["commonest_count"]},
            "classes": self.classes,
            "sizes": {name: list(size) for name, size in self.sizes.items()},
            "buckets": self.buckets,
            "left_out": {reason: len(names) for reason, names in self.left_out.items()},
            "left_out_first": {reason: names[:NAMED] for reason, names in self.left_out.items()},
            "duplicates": sum(tally.count for tally in self.duplicates.values()),
            "duplicates_by_kind": _counts(self.duplicates),
            "unused": _counts(self.unused),
            "encodings": {how: len(names) for how, names in self.encodings.items()},
            "encodings_first": {how: names[:NAMED] for how, names in self.encodings.items()},
            "notes": list(self.notes),
            "partial": self.partial,
            "examples": self.examples,
            "seconds": round(self.seconds, 3),
        }

    def line(self) -> str:
        """Return '4,812 images, 4,790 captions (4,655 distinct, 31 cut at 77 tokens), 22 without'."""
        facts = self.captions
        parts = [f"{facts.distinct:,} distinct"]
        cuts: dict[int, int] = {}
        for limit in facts.cut_by.values():
            cuts[limit["tokens"]] = max(cuts.get(limit["tokens"], 0), limit["captions"])
        parts += [f"{count:,} cut at {tokens} tokens" for tokens, count in sorted(cuts.items()) if count]
        captions = f"{facts.present:,} captions ({', '.join(parts)}), {facts.empty:,} without"
        if self.read < self.images:
            captions = f"of {self.read:,} read: {captions}"
        return f"{self.images:,} images, {captions}"

    def rows(self) -> list[tuple[str, str]]:
        """Return the table: what, and its value in words."""
        rows = [
            ("source", f"{self.source} ({self.layout})"),
            ("images", self.line()),
            ("captions from", self.captions_from),
        ]
        if self.captions.longest:
            rows.append(("longest caption", f"{self.captions.longest:,} characters ({self.captions.longest_name})"))
        if self.classes:
            shown = ", ".join(f"{name} {count:,}" for name, count in islice(self.classes.items(), 8))
            rows.append(("classes", f"{len(self.classes):,}: {shown}{', ...' if len(self.classes) > 8 else ''}"))
        if self.sizes:
            rows.append(("sizes", ", ".join(f"{name} {w}x{h}" for name, (w, h) in self.sizes.items())))
        if len(self.buckets) > 1:
            rows.append(("buckets", ", ".join(f"{name} {count:,}" for name, count in self.buckets.items())))
        for reason, names in self.left_out.items():
            rows.append((f"left out: {reason}", _named(len(names), names)))
        for title, tallies in (("duplicates", self.duplicates), ("not used", self.unused)):
            rows += [(f"{title}: {kind}", _named(tally.count, tally.names)) for kind, tally in tallies.items()]
        rows += [(f"text: {how}", _named(len(names), names)) for how, names in self.encodings.items()]
        rows += [("note", note) for note in self.notes]
        if self.partial:
            rows.append(("looked at", self.partial))
        rows.append(("time", f"{self.seconds:.1f} s"))
        return [(name.translate(CONTROL), value.translate(CONTROL)) for name, value in rows]

    def table(self) -> str:
        """Return `rows` as aligned lines."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _counts(tallies: Mapping[str, Tally]) -> dict[str, int]:
    return {kind: tally.count for kind, tally in tallies.items()}


def _named(count: int, names: Sequence[str]) -> str:
    """Return '12 (a.jpg, b.jpg, c.jpg, ...)'."""
    return f"{count:,} ({', '.join(names[:NAMED])}{', ...' if count > NAMED else ''})"


def summarise(
    source: ImageSource,
    name: str,
    usable: Sequence[int],
    *,
    found: int,
    pixels: np.ndarray,
    left_out: dict[str, str],
    buckets: dict[str, int],
    limits: Sequence[TokenLimit] = (CLIP_AT_LEAST,),
    notes: Sequence[str] = (),
    equal: Mapping[str, str] | None = None,
    examples: int = EXAMPLES,
    seconds: float = 0.0,
    partial: str = "",
) -> Summary:
    """Read captions and classes of a source and put all facts together.

    Args:
        source, name: the source and what `data.source` calls it.
        usable, found: images that can be used; images that were looked at.
        pixels: (N,2) width and height of the usable ones.
        left_out: name of every other image -> why.
        buckets: bucket -> images.
        limits: limits of the model's text encoders; CLIP's where no model is known.
        notes: sentences of the caller.
        equal: name of an image whose file comes a second time -> name of the first one.
        examples: images to describe one by one.
        seconds: time that was spent before.
        partial: what of a remote source was looked at.
    """
    label_of, damaged = read_labels(source, [usable[place] for place in spread_indices(len(usable), READ)])
    captions = read_captions(source, list(label_of), limits)
    damaged |= captions.damaged
    labels = [label for index, label in label_of.items() if index not in damaged]
    left_out = {**left_out, **{source.key(index): why for index, why in damaged.items()}}
    kept = [place for place, index in enumerate(usable) if index not in damaged]
    usable, pixels = [usable[place] for place in kept], pixels[kept]
    findings, numbers = source.findings, {-1 if label is None else label for label in labels}
    return Summary(
        source=name,
        layout=findings.layout,
        captions_from=findings.captions_from,
        found=found,
        images=len(usable),
        read=len(label_of) - len(captions.damaged),
        captions=captions,
        classes=_class_counts(source, labels),
        labels=sorted(numbers),
        sizes=size_facts(pixels),
        buckets=buckets,
        left_out=by_kind(left_out),
        unused=dict(findings.unused),
        duplicates=dict(findings.duplicates) | equal_files(equal or {}),
        encodings=_by_repair(findings.encodings),
        notes=_all_notes(findings, captions, notes),
        examples=[example(source, index, size) for index, size in islice(zip(usable, pixels, strict=True), examples)],
        seconds=seconds,
        partial=partial,
    )


def _class_counts(source: ImageSource, labels: Iterable[int | None]) -> dict[str, int]:
    counts = Counter(label for label in labels if label is not None)
    return {name_of_class(source, label): counts[label] for label in sorted(counts)}


def _by_repair(encodings: Mapping[str, str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for file, how in encodings.items():
        files.setdefault(how, []).append(file)
    return files


def _all_notes(findings: Findings, captions: CaptionFacts, notes: Sequence[str]) -> tuple[str, ...]:
    """Return the notes of source and caller, and a sentence on cut and on long captions."""
    too_long = [f"{file}: a caption of {length:,} characters is cut" for file, length in findings.cut.items()]
    lines = [f"{captions.several_lines:,} captions have several lines; each is one caption"]
    return (*findings.notes, *too_long[:NAMED], *notes, *(lines if captions.several_lines else ()))


def equal_files(equal: Mapping[str, str]) -> dict[str, Tally]:
    """Return the count of images whose file is there under another name, too."""
    tallies: dict[str, Tally] = {}
    for name, first in equal.items():
        add_to(tallies, EQUAL, f"{name} = {first}")
    return tallies


def read_labels(source: ImageSource, indices: Sequence[int]) -> tuple[dict[int, int | None], dict[int, str]]:
    """Return the class of each image, and of the images whose class cannot be read why."""
    labels: dict[int, int | None] = {}
    damaged: dict[int, str] = {}
    for index in indices:
        try:
            labels[index] = source.label(index)
        except UnreadableImage as error:
            damaged[index] = str(error)
    return labels, damaged


def name_of_class(source: ImageSource, label: int) -> str:
    """Return the name of a class, its number where the source has no names."""
    names = source.findings.class_names
    return names[label] if 0 <= label < len(names) else str(label)


def example(source: ImageSource, index: int, size: Sequence[int]) -> dict[str, Any]:
    """Return the facts of one image, with the `file` that `davae data --show` writes."""
    label = source.label(index)
    named = label is not None and label < len(source.findings.class_names)
    return {
        "name": source.key(index),
        "caption": source.caption(index),
        "class": name_of_class(source, label) if named and label is not None else label,
        "label": label,
        "width": int(size[0]),
        "height": int(size[1]),
        "file": None,
    }


def size_facts(pixels: np.ndarray) -> dict[str, tuple[int, int]]:
    """Return smallest, median and largest (width, height), by number of pixels."""
    if not len(pixels):
        return {}
    order = np.argsort(pixels[:, 0].astype(np.int64) * pixels[:, 1], kind="stable")
    places = {"smallest": order[0], "median": order[(len(order) - 1) // 2], "largest": order[-1]}
    return {name: (int(pixels[place, 0]), int(pixels[place, 1])) for name, place in places.items()}
