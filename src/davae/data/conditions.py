"""Checks of captions and classes before anything is trained."""

from __future__ import annotations

from davae.data.summary import Summary
from davae.errors import DataError

NEEDS_CLASSES = (
    "a class-conditional model needs a class for every image: one sub-folder a class, `.cls` files in the shards, or "
    "data.label_key or data.label_column"
)


def check_conditions(summary: Summary, num_classes: int | None, require_captions: bool) -> None:
    """Refuse classes that a model lacks, or required captions that are mostly empty or equal."""
    if num_classes is not None:
        check_classes(summary, num_classes)
    elif require_captions:
        check_captions(summary)


def check_captions(summary: Summary) -> None:
    """Refuse a text-to-image run in which most captions are empty or the same.

    Raises:
        DataError: naming what was found and how to give the caption.
    """
    facts, read = summary.captions, summary.read
    found = ""
    if 2 * facts.empty > read:
        found = f"{facts.empty:,} of {read:,} images have no caption"
    elif read > 1 and 2 * facts.commonest_count > read:
        found = f"{facts.commonest_count:,} of {read:,} captions are the same, {facts.commonest[:60]!r}"
    if found:
        raise DataError(
            f"data.source {summary.source}: {found} (captions from: {summary.captions_from}); put a .txt with the name of "
            "the image next to each, or name the caption by data.caption_key (a key of the .json) or data.caption_column "
            "(a column of the table); data.require_captions=false trains as it is"
        )


def check_classes(summary: Summary, num_classes: int) -> None:
    """Refuse images without a class, or with a number that is none of the model's classes."""
    where = f"data.source {summary.source}"
    if -1 in summary.labels:
        raise DataError(f"{where}: {NEEDS_CLASSES}")
    check_class_numbers(summary.labels, num_classes, where)


def check_class_numbers(labels: list[int], num_classes: int, where: str) -> None:
    """Refuse labels that are not classes of the model."""
    unexpected = [label for label in labels if not 0 <= label < num_classes]
    if unexpected:
        raise DataError(
            f"{where} has class label {unexpected[0]}, the model has classes 0 to {num_classes - 1}; "
            "use images of its classes, or a model with more"
        )
