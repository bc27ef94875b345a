"""A rehearsal of few equal blocks takes as much as that of all; a batch of any size takes no time."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from davae.backbones.expand import expand_transformer
from davae.cost.flops import meta_transformer
from davae.cost.frozen_features import Undrawn
from davae.cost.memory import (
    TrainingStep,
    fake_mode,
    stage1_memory,
    stage2_memory,
    transformer_sampling_bytes,
)
from davae.cost.repeated_blocks import FEW, Repeats, signature
from davae.latent import LatentLayout
from davae.pretrained.shapes import read_shapes
from davae.recipes.sections import Lora, Stage1, Stage2
from davae.zoo import resolve


class Block(nn.Module):
    def __init__(self, width: int = 4, last: bool = False):
        super().__init__()
        self.linear, self.last = nn.Linear(width, width), last


class UNet2DConditionModel(nn.Module):
    """A model of a known name."""

    def __init__(self, *runs: tuple[int, bool]):
        super().__init__()
        self.blocks = nn.ModuleList([Block(last=last) for count, last in runs for _ in range(count)])


def test_blocks_are_equal_when_they_compute_the_same():
    assert signature(Block()) == signature(Block())
    assert signature(Block()) != signature(Block(width=5))
    assert signature(Block()) != signature(Block(last=True)), "a flag"
    frozen = Block()
    frozen.linear.weight.requires_grad_(False)
    assert signature(Block()) != signature(frozen)


def test_each_run_counts_as_many_times_as_it_has_blocks():
    model = UNet2DConditionModel((10, False), (7, True), (1, False))

    def measure() -> tuple[float, ...]:
        return (float(sum(100 if block.last else 1 for block in model.blocks)) + 0.5,)

    assert measure() == (711.5,)
    repeats = Repeats(model)
    assert sorted(repeats.lengths.values()) == [7, 10]
    assert repeats.whole(measure) == (711.5,)
    assert len(model.blocks) <= 2 * FEW + 2, "few were left"


def test_a_model_that_may_count_its_blocks_stays_whole():
    class Unknown(UNet2DConditionModel):
        pass

    model = Unknown((10, False))
    repeats = Repeats(model)
    assert repeats.lengths == {}
    assert repeats.whole(lambda: (float(len(model.blocks)),)) == (10.0,)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_few_blocks_of_a_model_take_as_much_as_all(lora: Lora | None, monkeypatch: pytest.MonkeyPatch):
    shapes = read_shapes(resolve("micro"))
    layout = LatentLayout(shapes.channels, 16)

    def step(*, accumulation: int) -> TrainingStep:
        settings = Stage2(max_steps=1, batch_size=2, accumulation=accumulation, lora=lora)
        return stage2_memory(shapes, layout, 8, settings, mixed=False)

    def drawing() -> int:
        with torch.device("meta"):
            transformer = expand_transformer(meta_transformer(shapes), 16)
        return transformer_sampling_bytes(transformer, 8, 2)

    few = [step(accumulation=1), step(accumulation=2)], drawing()
    monkeypatch.setattr("davae.cost.repeated_blocks.UNIFORM", ())
    whole = [step(accumulation=1), step(accumulation=2)], drawing()
    assert few[1] == whole[1]
    for short, long in zip(few[0], whole[0], strict=True):
        assert short.flops == pytest.approx(long.flops, rel=1e-6)
        assert short.activations == pytest.approx(long.activations, rel=0.02)
        assert (short.weights, short.optimizer, short.ema) == (long.weights, long.optimizer, long.ema)


def test_an_absurd_batch_is_rehearsed_in_seconds():
    shapes = read_shapes(resolve("micro"))
    settings = Stage1(max_steps=1, batch_size=65_536, lambda_lpips=0.0)
    start = time.process_time()
    with fake_mode():
        assert Undrawn(65_536).normal(3, 2, 2).shape == (65_536, 3, 2, 2)
        assert Undrawn(65_536).uniform().shape == (65_536,)
    many = stage1_memory(shapes, 16, 2, 32, settings, mixed=False)
    assert time.process_time() - start < 30  # a minute and more where each sample had a generator
    one = stage1_memory(shapes, 16, 2, 32, settings.model_copy(update={"batch_size": 1}), mixed=False)
    assert many.activations > 1000 * one.activations
