"""Enlarging skips the model's calls that nothing uses, and draws the same image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import picture
from test_enlarging import pixels, two_time_pipeline
from upgraded_tiny import assembled, upgraded

import davae
from davae.backbones.families import denoiser
from davae.sample.canvas import Canvas
from davae.sample.skip_calls import REACH, skipped_calls

DIFFUSION = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory):
    return upgraded("UNet2DConditionModel", tmp_path_factory.mktemp("sd"))


def enlarged_both_ways(pipeline: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, int]:
    """Enlarge with and without skipped calls, check that the images are equal, and return the numbers of calls."""
    model, calls, results = denoiser(pipeline), [0, 0], []
    image = picture(7, 24, 16)
    for way in range(2):
        if way:
            monkeypatch.setattr(Canvas, "ignores", lambda *_: False)

        def count(*_: Any, way: int = way) -> None:
            calls[way] += 1

        forward = model.forward

        def counted(*args: Any, forward: Any = forward, count: Any = count, **more: Any) -> Any:
            count()
            return forward(*args, **more)

        model.forward = counted
        results.append(davae.upscale(pipeline, image, "a", steps=16, guidance_scale=2.0, **options)[0])
        assert model.forward is counted
        del model.forward
    np.testing.assert_array_equal(pixels(results[0]), pixels(results[1]))
    return calls[0], calls[1]


@pytest.mark.parametrize("name", DIFFUSION)
def test_schedulers_draw_the_same_image_with_fewer_calls(name: str, diffusion, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusion, "scheduler", getattr(diffusers, name).from_config(diffusion.scheduler.config))
    few, all_ = enlarged_both_ways(diffusion, monkeypatch, window=32)
    assert few < all_ or (few == all_ and name not in REACH)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_flow_matching_saves_calls_whatever_the_batch(
    batch_size: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    few, all_ = enlarged_both_ways(assembled(tiny_base), monkeypatch, batch_size=batch_size)
    assert few <= 0.65 * all_


def test_a_model_of_two_times_skips_too(monkeypatch: pytest.MonkeyPatch):
    few, all_ = enlarged_both_ways(two_time_pipeline(), monkeypatch, window=32)
    assert few <= 0.7 * all_


def test_without_a_draft_every_call_is_made(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    for options in ({"faithful": False}, {"strength": 0.5}):
        few, all_ = enlarged_both_ways(assembled(tiny_base), monkeypatch, **options)
        assert few == all_


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_left_as_it_was_and_new_shapes_are_real_calls(compiled: bool):
    model = torch.nn.Linear(2, 2)
    made: list[torch.Size] = []
    if compiled:
        model._compiled_call_impl = lambda x: made.append(x.shape) or torch.nn.functional.linear(x, model.weight)
    else:
        model.register_forward_pre_hook(lambda _, inputs: None)
        model.forward = lambda x: made.append(x.shape) or torch.nn.functional.linear(x, model.weight)
    before = dict(vars(model))
    with skipped_calls(model, lambda: True):
        first = model(torch.ones(1, 2))
        assert model(torch.zeros(1, 2)) is first
        assert model(torch.ones(3, 2)).shape == (3, 2)
    assert [shape[0] for shape in made] == [1, 3]
    assert vars(model) == before
    plain = torch.nn.Linear(2, 2)
    with skipped_calls(plain, lambda: False):
        assert not torch.equal(plain(torch.ones(1, 2)), plain(torch.zeros(1, 2)))
    assert "forward" not in vars(plain)
