"""Numbers and names of the classes of class-conditional pipelines.

These are LightningDiT's pipeline and that of DiT in diffusers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

from davae.backbones.families import denoiser, family_of


def goes_by_class(pipeline: Any) -> bool:
    """Return whether a pipeline draws classes, not prompts."""
    return family_of(pipeline).condition == "class"


def class_count(pipeline: Any) -> int:
    """Return the number of classes of a class-conditional pipeline, the null class left out."""
    model = denoiser(pipeline)
    return int(model.config[family_of(model).classes_key])


def class_names(pipeline: Any) -> dict[str, int]:
    """Return name -> number of a pipeline's classes.

    In DiT a class can have several names.
    """
    if hasattr(pipeline, "labels"):
        return pipeline.labels
    return {name: number for number, name in enumerate(pipeline.class_names)}


def named_classes(index: Mapping[str, Any]) -> dict[str, int]:
    """Return name -> number of the classes that a pipeline's `model_index.json` lists."""
    if labels := index.get("id2label"):  # several names of a number, as diffusers' DiT pipeline reads them
        return {name.strip(): int(number) for number, names in labels.items() for name in names.split(",")}
    return {name: number for number, name in enumerate(index.get("class_names") or [])}


def example_classes(pipeline: Any, most: int) -> list[str]:
    """Return a few classes of a pipeline, as prompts that draw them.

    A class whose name is a number is given by its own number: a prompt of digits is a number, and folders of numbers are
    sorted as text.

    Args:
        pipeline: a class-conditional one.
        most: classes to return, at most.
    """
    names = {number: name for name, number in class_names(pipeline).items() if not name.isdecimal()}
    return [names.get(number, str(number)) for number in range(min(most, class_count(pipeline)))]


def class_number(pipeline: Any, label: SupportsIndex | str) -> int:
    """Return the number of a class given by number, or by name or a part of it.

    Raises:
        ValueError: no such class, or several.
    """
    return find_class(label, class_names(pipeline), class_count(pipeline))


def find_class(label: SupportsIndex | str, names: dict[str, int], count: int) -> int:
    """Return the number of a class given by number, or by name or a part of it.

    Args:
        label: the number or name.
        names: name -> number.
        count: number of classes.

    Raises:
        ValueError: no such class, or several.
    """
    if not isinstance(label, str) or label.isdecimal():
        try:
            number = int(label) if isinstance(label, str) else operator.index(label)
        except TypeError as error:
            raise ValueError(
                f"class {label!r} is neither a number nor a name; use a number to {count - 1}"
            ) from error
        if not 0 <= number < count:
            raise ValueError(f"class label {number} is out of range: the model has classes 0 to {count - 1}")
        return number
    lower = label.lower()
    numbers = {name.lower(): number for name, number in names.items()}
    if lower in numbers:
        return numbers[lower]
    found = sorted({number for name, number in numbers.items() if lower in name})
    if len(found) == 1:
        return found[0]
    shown = list(numbers)[:10]
    known = (
        f"its classes are {', '.join(shown)}{', ...' if len(numbers) > 10 else ''}"
        if shown
        else "it has no class names"
    )
    problem = f"fits {len(found)} classes" if found else "is not a class of this model"
    raise ValueError(f"'{label}' {problem}; {known}; numbers 0 to {count - 1} work too")


def label_names(pipeline: Any) -> dict[str, str]:
    """Return DiT's `id2label`, number -> names joined by commas, of a pipeline.

    The pipeline itself keeps name -> number.
    """
    names: dict[str, list[str]] = {}
    for name, number in pipeline.labels.items():
        names.setdefault(str(number), []).append(name)
    return {number: ", ".join(values) for number, values in names.items()}
