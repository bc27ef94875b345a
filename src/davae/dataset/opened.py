"""A recipe's images, opened: source, buckets, split and summary."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from davae.data.batches import Batches
from davae.data.buckets import bucket_sizes, group_counts
from davae.data.equal_files import FileImages, equal_images
from davae.data.images import ImageDataset, ImageSource, Split, split, spread_indices
from davae.data.latent_cache.key import hash_images, hash_values
from davae.data.options import SourceOptions
from davae.data.sizes import ImageSizes, keep_sizes, load_sizes, measure_sizes, sizes_key
from davae.data.sources import open_source
from davae.data.summary import CLIP_AT_LEAST, EXAMPLES, Summary, TokenLimit, count_words, summarise
from davae.data.survey import Survey, survey
from davae.errors import DataError, ModelError, RecipeError
from davae.files.atomic import atomic_text
from davae.files.reading import load_json
from davae.pretrained.text_encoders import TokenCount, token_limits
from davae.recipes import check_command_source
from davae.recipes.base import BaseRecipe, TextArchitecture
from davae.recipes.sections import Data, Optim
from davae.tasks.base_model import BaseModel
from davae.train.distributed import differing_values, from_main, is_main, ranks

logger = logging.getLogger(__name__)

SUMMARY = "data.json"  # in a run folder


@dataclass(frozen=True)
class OpenedData:
    """A recipe's images, looked through once: training, held-out and left-out ones."""

    source: ImageSource
    sizes: list[tuple[int, int]]  # (width, height) of the buckets; one square without them
    train: list[int]
    groups: np.ndarray  # bucket of each training image
    held_out: list[int]  # those that fill the square: what is measured is square
    data: Data
    survey: Survey  # of training and held-out images
    measured: ImageSizes
    found: int  # images that were looked at
    seconds: float
    equal: dict[int, int]  # image whose file comes a second time -> the first one
    equal_held: int  # held-out images that are not measured, because their equals train

    @property
    def left_out(self) -> dict[str, str]:
        """Name of every image that cannot be used, and why."""
        return self.survey.left_out

    def keep(self, folder: Path) -> None:
        """Keep the sizes in a run folder: the next start reads no header."""
        if is_main():
            chosen = spread_indices(len(self.source), self.data.limit)
            keep_sizes(folder, sizes_key(self.source, chosen, repr(source_options(self.data))), self.measured)

    def pictures(self, data: Data, seed: int) -> ImageDataset:
        """Return the training images, in their buckets."""
        return ImageDataset(
            self.source,
            self.train,
            self.sizes[0][0],
            seed=seed,
            flip=data.flip,
            crop=data.crop,
            sizes=self.sizes,
            groups=self.groups,
            enlarge=data.enlarge,
        )

    def squares(self, indices: Sequence[int], seed: int = 0) -> ImageDataset:
        """Return chosen images as squares, for what is measured and shown."""
        return ImageDataset(self.source, indices, self.sizes[0][0], seed=seed, enlarge=self.data.enlarge)

    @property
    def shown_from(self) -> Literal["held out", "training"]:
        """Side of the split from which the images of `shown` come."""
        return "held out" if self.held_out else "training"

    def shown(self, num: int) -> list[int]:
        """Return up to `num` held-out images that fill the square, else training images."""
        square, large = self.sizes[0], self.data.enlarge
        indices = self.held_out or [
            i
            for i, g in zip(self.train, self.groups, strict=True)
            if large or covers_square(self.source, i, square, int(g))
        ]
        return [indices[place] for place in spread_indices(len(indices), num)]

    def summary(
        self,
        limits: Sequence[TokenLimit] = (CLIP_AT_LEAST,),
        notes: Sequence[str] = (),
        examples: int = EXAMPLES,
        partial: str = "",
    ) -> Summary:
        """Return the summary of all usable images, the first process's on every process.

        Args:
            limits: limits of the model's text encoders; none for a model without any.
            notes: sentences to add.
            examples: images to describe one by one.
            partial: what of a remote source was looked at.
        """
        if not is_main():
            return from_main(None, patient=True)
        started = time.perf_counter()
        if self.equal_held:
            notes = [
                *notes,
                f"{self.equal_held:,} held-out images are equal to training images: they are neither trained nor measured",
            ]
        equal = {self.source.key(index): self.source.key(first) for index, first in self.equal.items()}
        found = summarise(
            self.source,
            self.data.source,
            self.survey.indices,
            found=self.found,
            pixels=self.survey.pixels,
            left_out=self.left_out,
            buckets=group_counts(self.sizes, self.survey.groups),
            limits=limits,
            notes=notes,
            equal=equal,
            examples=examples,
            seconds=self.seconds,
            partial=partial,
        )
        found = replace(found, seconds=self.seconds + time.perf_counter() - started)
        return from_main(found, patient=True)


def source_options(data: Data) -> SourceOptions:
    return SourceOptions(**data.model_dump(include={field.name for field in fields(SourceOptions)}))


def open_pictures(
    data: Data, resolution: int | None, step: int | None = None, *, folder: Path | None = None, strict: bool = True
) -> OpenedData:
    """Open the images of a recipe, unless its source is a command that nobody typed.

    Raises:
        RecipeError: such a command, or buckets where they cannot be.
        DataError: nothing there, or nothing left.
    """
    check_command_source(data.source)
    return open_images(data, resolution, step, folder=folder, strict=strict)


def open_images(
    data: Data,
    resolution: int | None,
    step: int | None = None,
    *,
    folder: Path | None = None,
    strict: bool = True,
    side: Literal["both", "train", "held_out"] = "both",
) -> OpenedData:
    """Open the images of a source, without those that fill no bucket.

    Headers are read by the first process alone; the others receive the sizes.

    Args:
        resolution: pixels of the square; None keeps images of every size.
        step: pixels that a token spans; None where a training takes squares alone.
        folder: run folder that may keep the sizes of an earlier start, next to the cache.
        strict: refuse a source without a usable image.
        side: side of the split to look at.

    Raises:
        RecipeError: buckets where they cannot be.
        DataError: nothing there, or nothing left.
    """
    if data.buckets is not None and (step is None or resolution is None):
        raise RecipeError("data.buckets: this model takes square images only; leave it out")
    started = time.perf_counter()
    source = open_source(data.source, resolution or 1, source_options(data))
    sizes = [] if resolution is None else [(resolution, resolution)]
    if data.buckets is not None:
        assert step is not None
        assert resolution is not None
        sizes = bucket_sizes(resolution, step, data.buckets.max_ratio, data.buckets.tokens)
    chosen = spread_indices(len(source), data.limit)
    parts = split(source, data.holdout, chosen)
    if side == "held_out":
        parts = Split(parts.train, apart_from(source, chosen, parts))
    chosen = chosen if side == "both" else getattr(parts, side)
    measured = measured_sizes(source, chosen, data, folder)
    found = survey(source, chosen, sizes, data.enlarge, measured, strict)
    train, groups, squares = split_found(found, parts, sizes, data.enlarge)
    equal = {chosen[place]: chosen[first] for place, first in measured.equal.items()}
    trained = {equal.get(index, index) for index in train} if equal and squares else set[int]()
    apart = [index for index in squares if equal.get(index, index) not in trained]
    opened = OpenedData(
        source,
        sizes,
        train,
        groups,
        apart,
        data,
        found,
        measured,
        len(chosen),
        time.perf_counter() - started,
        equal,
        len(squares) - len(apart),
    )
    check_same_data(opened, data.source)
    return opened


def measured_sizes(source: ImageSource, chosen: Sequence[int], data: Data, folder: Path | None) -> ImageSizes:
    """Return the sizes of chosen images, from headers that the first process reads.

    All processes call it together.

    Args:
        source: the images.
        chosen: those that are measured.
        data: the recipe's section, which may change their sizes.
        folder: run folder that may keep the sizes of an earlier start, and takes new ones.
    """
    measured = None
    if is_main():
        place = folder if folder is not None and folder.is_dir() else None
        key = sizes_key(source, chosen, repr(source_options(data))) if place else ""
        measured = (load_sizes(place, key, len(chosen)) if place else None) or measure_sizes(source, chosen)
        if place and (place / "recipe.yaml").is_file():  # a run's folder
            keep_sizes(place, key, measured)  # at once: the headers of a large set take hours
    measured = from_main(measured, patient=True)
    # a process that found other files measures its own, and check_same_data names them
    return measured if len(measured.pixels) == len(chosen) else measure_sizes(source, chosen)


def split_found(
    found: Survey, parts: Split, sizes: Sequence[tuple[int, int]], enlarge: bool
) -> tuple[list[int], np.ndarray, list[int]]:
    """Divide usable images into those that train and those that are held out.

    Args:
        found: the usable images.
        parts: the split of all images.
        sizes: (width, height) of the buckets, the square first.
        enlarge: whether small images are enlarged.

    Returns:
        Training images, the bucket of each, and held-out images that fill the square. Where only held-out images are
        usable, they train.
    """
    held = set(parts.held_out)
    trains = np.asarray([index not in held for index in found.indices], bool)
    if not trains.any():
        trains = ~trains
        held = set()
    train = [index for index, own in zip(found.indices, trains, strict=True) if own]
    squares = [
        i
        for i, g, size in zip(found.indices, found.groups, found.pixels, strict=True)
        if i in held and (enlarge or g == 0 or min(size) >= sizes[0][0])
    ]
    return train, found.groups[trains], squares


def apart_from(source: ImageSource, chosen: Sequence[int], parts: Split) -> list[int]:
    """Return held-out images unlike any training image's file, or all where none is left."""
    equal: dict[int, int] = {}
    if is_main() and isinstance(source, FileImages) and parts.held_out:
        equal = {chosen[place]: chosen[first] for place, first in equal_images(source, chosen).items()}
    equal = from_main(equal, patient=True)
    trained = {equal.get(index, index) for index in parts.train}
    apart = [index for index in parts.held_out if equal.get(index, index) not in trained]
    if len(apart) < len(parts.held_out):
        logger.warning("%d held-out images are equal to training images", len(parts.held_out) - len(apart))
    return apart or parts.held_out


def check_same_data(opened: OpenedData, name: str) -> None:
    """Compare the images of all processes of a launch before they are used.

    All processes call it together. Names, sizes in bytes, captions and the split are compared, not pixels.

    Raises:
        DataError: another process found other images.
    """
    if ranks() == 1:
        return
    indices = [*opened.train, *opened.held_out]
    digest = hash_values(
        hash_images(opened.source, indices), len(opened.train), opened.groups.tolist(), sorted(opened.left_out)
    )
    if not (differing := differing_values(digest)):
        return
    keys = differing_values([opened.source.key(index) for index in indices])
    (_, first_host, _), (other, host, _) = differing[:2]
    found = f"process {other} on {host} has images of other sizes, captions or buckets than process 0 on {first_host}"
    if keys:
        own, theirs = keys[0][2], keys[1][2]
        odd = sorted(set(own) ^ set(theirs))
        found = (
            f"process {other} on {host} found {len(theirs)} images, process 0 on {first_host} {len(own)}"
            f"{f'; {odd[0]!r} is in one alone' if odd else ', in another order'}"
        )
    raise DataError(
        f"data.source: {name}: {found}; give all processes the same files, on a shared disk or as equal copies"
    )


def covers_square(source: ImageSource, index: int, square: tuple[int, int], group: int) -> bool:
    """Return whether a usable image is large enough for the square.

    An image whose bucket is the square is.
    """
    return group == 0 or min(source.size(index)) >= square[0]


def architecture_limits(recipe: BaseRecipe) -> list[TokenLimit]:
    """Return the limit of a text encoder that is trained from scratch, counted in words."""
    architecture = recipe.architecture
    if not isinstance(architecture, TextArchitecture):
        return []
    return [TokenLimit("text_encoder", architecture.text_tokens, count_words)]


def model_limits(base: BaseModel) -> list[TokenLimit]:
    """Return the limits of a model's text encoders, in words where no tokenizer loads."""
    if base.planned is not None:
        return architecture_limits(base.planned)
    return with_counts(token_limits(base.configs, base.shapes.transformer_config))


def with_counts(limits: Sequence[tuple[str, int, TokenCount | None]]) -> list[TokenLimit]:
    """Return limits that count words where no tokenizer is known."""
    return [TokenLimit(name, tokens, with_words(count) if count else count_words) for name, tokens, count in limits]


def with_words(count: Callable[[list[str]], list[int]]) -> Callable[[list[str]], list[int]]:
    """Count tokens, or words at least where the tokenizer cannot be loaded, with one warning."""
    missing: list[str] = []

    def tokens(captions: list[str]) -> list[int]:
        if not missing:
            try:
                return count(captions)
            except ModelError as error:
                missing.append(str(error))
                logger.warning("captions are counted by their words, at least: %s", error)
        return count_words(captions)

    return tokens


def announce(summary: Summary, path: Path | None) -> None:
    """Log a summary as a table and write it as JSON, in the first process."""
    if not is_main():
        return
    logger.info("data\n%s", summary.table())
    if path is not None and not same_facts(path, summary):
        atomic_text(path, json.dumps(summary.as_dict(), indent=1, ensure_ascii=False) + "\n")


def same_facts(path: Path, summary: Summary) -> bool:
    """Return whether a file holds this summary already, but for the time that it took."""
    try:
        written = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and {**written, "seconds": 0} == {**summary.as_dict(), "seconds": 0}


def bucket_notes(opened: OpenedData, stage: str, settings: Optim, variants: int = 1) -> list[str]:
    """Return a sentence on each bucket with fewer images than a batch of a stage."""
    if len(opened.sizes) == 1:
        return []
    groups = np.repeat(opened.groups, variants)
    steps, size = settings.max_steps * settings.accumulation, settings.batch_size
    order = Batches(len(groups), size, seed=0, start=0, stop=steps, groups=groups)
    notes = []
    for group, batches in order.of_buckets().items():
        if (count := int((groups == group).sum())) >= size:
            continue
        width, height = opened.sizes[group]
        drawn = f"{batches:,} of {steps:,} batches are of it, its images repeated within each"
        never = f"none of the {steps:,} batches is of it; raise {stage}.max_steps or lower data.buckets.max_ratio"
        notes.append(
            f"{stage}: bucket {width}x{height} holds {count:,} items, fewer than a batch of {size:,}: "
            f"{drawn if batches else never}"
        )
    return notes
