"""stage2.hold_base: the pretrained prediction as a share of the base's target."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stage2_options import flux_task

from davae import LatentLayout, expand_transformer
from davae.cost.flops import meta_transformer
from davae.cost.memory import TrainingStep, stage2_memory
from davae.pretrained.shapes import read_shapes
from davae.recipes.sections import Lora, Stage2
from davae.tasks.held_base import HeldBase, held_target
from davae.train.random import SampleRandom

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = LatentLayout(4, 4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_both_errors_weighed(share: float):
    prediction, target, pretrained = torch.randn(3, 2, 8, 3, 3, dtype=torch.float64)
    prediction.requires_grad_()
    both = (1 - share) * (prediction - target).square() + share * (prediction - pretrained).square()
    base, _ = LAYOUT.split(both)
    _, detail = LAYOUT.split((prediction - target).square())
    (expected,) = torch.autograd.grad(base.sum() + detail.sum(), prediction)
    held = held_target(target, pretrained, LAYOUT, share)
    (found,) = torch.autograd.grad((prediction - held).square().sum(), prediction)
    torch.testing.assert_close(found, expected)


def held_losses(share: float, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[dict[str, float], Any]:
    """Return the losses of a first step of a tiny FLUX that is held to a copy of its start, and its task."""
    torch.manual_seed(0)
    task, _, _ = flux_task(False, **settings)
    task.modules["transformer"] = task.transformer
    if share:
        mixed = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype != torch.float32)
        task.held = HeldBase(copy.deepcopy(task.transformer).to(dtype), task.layout, share, mixed)
    torch.manual_seed(3)
    batch = {"latents": torch.randn(8, 8, 4, 4), "conditions": ["a"] * 8}
    total, values = task.loss("transformer", batch, 0, SampleRandom(0, "stage2", 0, 0, 8))
    total.backward()
    return {name: float(value) for name, value in values.items()}, task


def test_the_base_loss_of_a_warm_start_falls_with_the_square_of_what_is_held():
    """At the first step the prediction is the pretrained one, so that the error is (1 - h) (v_0 - v)."""
    plain, _ = held_losses(0.0)
    for share in (0.5, 1.0):
        held, task = held_losses(share)
        assert held["loss_base"] == pytest.approx((1 - share) ** 2 * plain["loss_base"], rel=1e-4, abs=1e-9)
        assert held["loss_detail"] == plain["loss_detail"]
        assert all(parameter.grad is None for parameter in task.held.transformer.parameters())
        assert not any("held" in name for name in task.trainables)


def test_a_frozen_transformer_in_half_precision_is_within_its_rounding():
    plain, _ = held_losses(0.0)
    held, _ = held_losses(1.0, torch.bfloat16)
    assert 0 < held["loss_base"] < 0.05 * plain["loss_base"]


def test_a_clean_base_has_no_error_though_it_is_held():
    held, _ = held_losses(1.0, clean_base=0.5)
    assert held["loss_base"] == pytest.approx(0.0, abs=1e-9)


def test_new_weights_that_change_the_base_cannot_hold_it():
    with pytest.raises(ValueError, match="hold_base needs the pretrained base of new_weights: zero"):
        Stage2(max_steps=1, batch_size=1, hold_base=0.5, new_weights="random")
    with pytest.raises(ValueError, match="hold_base"):
        Stage2(max_steps=1, batch_size=1, hold_base=1.1)


def test_the_plan_counts_the_frozen_transformer_and_its_pass():
    shapes, layout = read_shapes(str(ROOT / "src/davae/zoo/micro/base")), LatentLayout(8, 8)

    def step(share: float, frozen: torch.dtype = torch.float32) -> TrainingStep:
        settings = Stage2(max_steps=1, batch_size=4, hold_base=share, lora=Lora(rank=8))
        return stage2_memory(shapes, layout, 16, settings, mixed=frozen != torch.float32, frozen=frozen)

    plain, held = step(0.0), step(0.5)
    parameters = sum(p.numel() for p in expand_transformer(meta_transformer(shapes), 8).parameters())
    assert held.weights - plain.weights == 4 * parameters
    half = torch.bfloat16
    assert step(0.5, half).weights - step(0.0, half).weights == 2 * parameters
    assert 1.2 * plain.flops < held.flops < 1.6 * plain.flops
    assert (held.optimizer, held.activations) == (plain.optimizer, plain.activations)
