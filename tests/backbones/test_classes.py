"""Classes of a class-conditional pipeline as prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("label", [1, "1", np.int64(1), np.array(1), torch.tensor(1), "dog"])
def test_a_class_is_any_integer_or_a_name(label: object):
    assert find_class(label, {"cat": 0, "dog": 1}, 3) == 1


@pytest.mark.parametrize("label", [1.0, None, np.float32(1), torch.tensor(1.0), np.array([1, 2]), b"dog"])
def test_a_class_that_is_neither_is_one_line(label: object):
    with pytest.raises(ValueError, match=r"class .* is neither a number nor a name; use a number to 2$"):
        find_class(label, {"cat": 0, "dog": 1}, 3)
