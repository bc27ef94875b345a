"""Samples that evaluations of one model share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from test_training import run_cli

import davae.evaluate.drawn
import davae.evaluate.real_set
from davae.errors import RunError
from davae.evaluate.drawn import check_keep, drawn_batches
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


def test_a_folder_that_is_read_keeps_nothing(tmp_path: Path):
    for name in ("model", "images", "free"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    model, images = str(tmp_path / "model"), str(tmp_path / "images")
    for keep, why in (("model/kept", "lies in"), ("images", "lies in"), ("file", "is a file")):
        with pytest.raises(RunError, match=f"--keep .*{why}"):
            check_keep(tmp_path / keep, model, images)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(RunError, match="lies in"):
        check_keep(tmp_path / "link" / "kept", model, images)
    check_keep(tmp_path / "free", model, images)
    check_keep(tmp_path / "new", "micro", "openmoji")


def test_the_command_keeps_what_further_calls_need(tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch):
    """Another enlargement draws nothing, and the real images are measured once; figures are those without `--keep`."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(8):
        picture(number).resize((96, 96)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"image {number}")
    words = ["evaluate", "generation", "--pipeline", "micro", "--data", str(data), "--num", "8", "--steps", "1"]
    words += ["--compare-at", "96", "--patch-size", "0"]
    run_cli(*words, "--json", str(tmp_path / "plain.json"))
    drawn.clear()
    for method in ("bilinear", "lanczos", "bilinear"):
        monkeypatch.setattr(davae.evaluate.real_set, "_measured", {})
        kept = ["--keep", str(tmp_path / "kept"), "--json", str(tmp_path / f"{method}.json")]
        run_cli(*words, "--upscale", method, *kept)
    assert drawn == [0]
    assert len(list((tmp_path / "kept" / "real").iterdir())) == 1
    plain, again, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "bilinear", "lanczos")
    )
    assert again == plain
    assert other["fd_lite0"] != plain["fd_lite0"]
