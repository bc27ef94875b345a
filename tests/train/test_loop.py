"""The training loop on a one-parameter task: non-finite steps, and what a checkpoint remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_recipe

from davae.errors import RunError
from davae.recipes.sections import Optim, Run
from davae.tasks.stage1 import random_squares
from davae.tasks.text_to_image import build_tokenizer
from davae.train.loop import Trainer
from davae.train.random import SampleRandom
from davae.train.run_folder import RunFolder, read_metrics
from davae.train.task import Trainable


class OneWeight:
    """Pulls a weight to zero; the loss is NaN at the steps that are named."""

    name = "one"

    def __init__(self, max_steps: int, bad: set[int], optimizer: str):
        self.settings, self.bad = Optim(max_steps=max_steps, batch_size=1, lr=0.1, optimizer=optimizer), bad
        self.dataset, self.collate = [0.0] * 4, lambda items: items
        self.weight = torch.nn.Linear(1, 1, bias=False)
        self.trainables = {"one": Trainable(self.weight, [{"params": list(self.weight.parameters())}], lr=0.1)}
        self.modules: dict[str, torch.nn.Module] = {"one": self.weight}

    def prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None: ...

    def trainables_at(self, step: int) -> list[str]:
        return ["one"]

    def loss(self, player: str, batch: Any, step: int, draws: object) -> tuple[torch.Tensor, dict]:
        loss = self.weight.weight.square().sum() * (float("nan") if step in self.bad else 1.0)
        return loss, {"loss": loss.detach()}


class Items(list):
    groups = None

    def __getitem__(self, item: Any) -> Any:
        return super().__getitem__(item[0])


def train(folder: Path, max_steps: int, bad: set[int], optimizer: str = "adamw") -> OneWeight:
    torch.manual_seed(0)
    task = OneWeight(max_steps, bad, optimizer)
    task.dataset = Items(task.dataset)
    run = Run(log_every=1, checkpoint_every=2)
    Trainer(task, run, RunFolder(folder, tiny_recipe()), Accelerator(cpu=True)).fit()  # type: ignore[arg-type]
    return task


def test_a_bad_step_is_skipped_counted_and_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(tmp_path / "whole", 6, {1, 4})
    first = train(tmp_path / "halves", 3, {1, 4})
    again = train(tmp_path / "halves", 6, {1, 4})
    assert [r["skipped"] for r in read_metrics(tmp_path / "whole/metrics.jsonl")] == [0, 1, 1, 1, 2, 2]
    assert [r["skipped"] for r in read_metrics(tmp_path / "halves/metrics.jsonl")] == [0, 1, 1, 1, 2, 2]
    assert torch.equal(whole.weight.weight, again.weight.weight)
    assert torch.isfinite(first.weight.weight).all()
    assert "1 step(s) until step 2 skipped, their gradient is not finite (1 so far)" in caplog.text


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"not finite for 10 steps in a row, until step 14; the weights before them are saved; lower one\.lr",
    ):
        train(tmp_path, 30, set(range(4, 30)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()], "the checkpoint before it is kept"


def test_tokenizer_is_the_same_every_time() -> None:
    captions = ["a red rose", "a blue rose on a red background", "the roses"]
    one, two = build_tokenizer(captions, 600, 8), build_tokenizer(captions, 600, 8)
    assert one.get_vocab() == two.get_vocab()
    assert one.get_vocab()["!</w>"] == 2, "bytes at the end of a word follow the two marks, in order"
    assert one("a red rose").input_ids == two("a red rose").input_ids


def test_random_squares_are_cut_from_the_pictures_where_they_are_drawn():
    images = torch.arange(4 * 3 * 24 * 32, dtype=torch.float64).view(4, 3, 24, 32)  # no value twice
    draws = SampleRandom(0, "stage1", 5, 0, 4)
    squares = random_squares(images, 16, draws)
    assert squares.shape == (4, 3, 16, 16)
    places = set()
    for picture, square in zip(images, squares, strict=True):
        y, x = divmod(int(square[0, 0, 0]) % (24 * 32), 32)
        assert torch.equal(square, picture[:, y : y + 16, x : x + 16])
        places.add((y, x))
    assert len(places) == 4
    assert torch.equal(random_squares(images, 16, draws.restarted()), squares)
    assert random_squares(images, 24, draws) is images


def test_whole_pictures_draw_nothing():
    draws, untouched = SampleRandom(0, "stage1", 5, 0, 4), SampleRandom(0, "stage1", 5, 0, 4)
    random_squares(torch.rand(4, 3, 16, 16), 16, draws)
    assert torch.equal(draws.uniform(), untouched.uniform())
