"""Classes of a class-conditional pipeline as prompts."""

from __future__ import annotations

import pytest

from davae.backbones import classes
from davae.backbones.classes import example_classes, find_class


@pytest.mark.parametrize(
    ("names", "most", "expected"),
    [
        (["1", "10", "2"], 8, ["0", "1", "2"]),  # folders of numbers, sorted as text
        (["cat", "2", "dog"], 8, ["cat", "1", "dog"]),
        (["cat", "dog", "fox"], 2, ["cat", "dog"]),
        ([], 2, ["0", "1"]),
    ],
)
def test_example_classes_draw_the_class_that_they_name(
    names: list[str], most: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    numbers = {name: number for number, name in enumerate(names)}
    monkeypatch.setattr(classes, "class_names", lambda pipeline: numbers)
    monkeypatch.setattr(classes, "class_count", lambda pipeline: 3)
    found = example_classes("pipeline", most)
    assert found == expected
    assert [find_class(name, numbers, 3) for name in found] == list(range(len(found)))
