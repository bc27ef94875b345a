"""Samples that evaluations of one model share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import davae.evaluate.drawn
from davae.evaluate.drawn import drawn_batches
from davae.sample.open import SamplingOptions, open_model

OPTIONS = SamplingOptions(steps=1, guidance=1.0, seed=3, batch_size=1)
PROMPTS = ["a red apple", "a blue fish", "a green leaf"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the first images of each call that draws."""
    calls: list[int] = []
    generate = davae.evaluate.drawn.generate

    def counted(*args: Any, first: int, **options: Any) -> Any:
        calls.append(first)
        return generate(*args, first=first, **options)

    monkeypatch.setattr(davae.evaluate.drawn, "generate", counted)
    return calls


def halves(images: list[Image.Image], prompts: list[str]) -> list[Image.Image]:
    return [image.resize((32, 32)) for image in images]


def test_kept_samples_are_drawn_once_and_are_the_same(tmp_path: Path, drawn: list[int]):
    model, _ = open_model("micro")
    plain = torch.cat(list(drawn_batches("micro", model, PROMPTS, OPTIONS, None, lambda *_: None)))
    assert plain.shape == (3, 3, 64, 64)
    assert drawn == [0, 2]
    keep = tmp_path / "drawn"
    first = drawn_batches("micro", model, PROMPTS, OPTIONS, halves, lambda *_: None, keep)
    assert next(first).shape == (2, 3, 32, 32)
    first.close()  # as by an interruption
    assert drawn == [0, 2, 0]
    kept = torch.cat(list(drawn_batches("micro", model, PROMPTS, OPTIONS, None, lambda *_: None, keep)))
    assert drawn == [0, 2, 0, 2], "the first part is read, the second drawn"
    assert torch.equal(kept, plain)


@pytest.mark.parametrize(
    ("prompts", "options"),
    [(PROMPTS[::-1], OPTIONS), (PROMPTS, SamplingOptions(steps=1, guidance=1.0, seed=4, batch_size=1))],
    ids=["prompts", "seed"],
)
def test_samples_of_other_settings_are_kept_apart(tmp_path: Path, prompts: list[str], options: SamplingOptions):
    model, _ = open_model("micro")

    def kept(prompts: list[str], options: SamplingOptions) -> torch.Tensor:
        return torch.cat(list(drawn_batches("micro", model, prompts, options, None, lambda *_: None, tmp_path)))

    first, other = kept(PROMPTS, OPTIONS), kept(prompts, options)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(kept(PROMPTS, OPTIONS), first)
    plain = torch.cat(list(drawn_batches("micro", model, prompts, options, None, lambda *_: None)))
    assert torch.equal(other, plain)
