"""Enlarging skips the model's calls that nothing uses, and draws the same image."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
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
from davae.pretrained.shapes import default_resolution
from davae.sample.canvas import Canvas
from davae.sample.skip_calls import REACH, skipping

DIFFUSION = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of Stable Diffusion


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory):
    return upgraded("UNet2DConditionModel", tmp_path_factory.mktemp("sd"))


def enlarged_both_ways(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, steps: int = 16, **options: Any
) -> tuple[int, int]:
    """Enlarge with and without skipped calls, check that the images are equal, and return the numbers of calls."""
    model, calls, results = denoiser(pipeline), [0, 0], []
    image = picture(7, 24, 16)
    for way in range(2):
        if way:
            monkeypatch.setattr(Canvas, "ignores", lambda *_: False)

        def count(*_: Any, way: int = way) -> None:
            calls[way] += 1

        hook = model.register_forward_hook(count)
        results.append(davae.upscale(pipeline, image, "a", steps=steps, guidance_scale=2.0, **options)[0])
        hook.remove()
    np.testing.assert_array_equal(pixels(results[0]), pixels(results[1]))
    return calls[0], calls[1]


@pytest.mark.parametrize("name", DIFFUSION)
def test_schedulers_draw_the_same_image_with_fewer_calls(name: str, diffusion, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusion, "scheduler", getattr(diffusers, name).from_config(diffusion.scheduler.config))
    few, all_ = enlarged_both_ways(diffusion, monkeypatch, window=32)
    assert few < all_ or (few == all_ and name not in REACH)


@pytest.mark.parametrize("steps", [6, 9, 16])
def test_the_runge_kutta_steps_of_pndm_reach_far(steps: int, diffusion, monkeypatch: pytest.MonkeyPatch):
    config = {**diffusion.scheduler.config, "skip_prk_steps": False}
    monkeypatch.setattr(diffusion, "scheduler", diffusers.PNDMScheduler.from_config(config))
    enlarged_both_ways(diffusion, monkeypatch, window=32, steps=steps)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_flow_matching_saves_calls_whatever_the_batch(
    batch_size: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    few, all_ = enlarged_both_ways(assembled(tiny_base), monkeypatch, batch_size=batch_size)
    assert few <= 0.65 * all_


def test_a_model_of_two_times_skips_too(monkeypatch: pytest.MonkeyPatch):
    few, all_ = enlarged_both_ways(two_time_pipeline(), monkeypatch, window=32)
    assert few <= 0.7 * all_


@pytest.mark.parametrize(
    ("name", "config", "options", "calls"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, {}, 17),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}, 10),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 1.15}, 9),
        ("DDIMScheduler", SCALED, {}, 13),
        ("DPMSolverMultistepScheduler", SCALED, {}, 15),
        ("UniPCMultistepScheduler", SCALED, {}, 30),
    ],
)
def test_the_page_s_numbers_of_calls(name: str, config: dict[str, Any], options: dict[str, Any], calls: int):
    """docs/three-jobs.md: calls of 30 steps in flow matching, with the shifts of SD3 and of FLUX at 1K, and in diffusion."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(30, **options)
    canvas = Canvas.__new__(Canvas)
    canvas.draft, canvas.free = torch.zeros(1), 0
    made = 0
    for canvas.calls in range(30):
        made += not canvas.ignores(SimpleNamespace(scheduler=scheduler))
    assert made + (made < 30) == calls, "the first call is made all the same"


def test_without_a_draft_every_call_is_made(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    for options in ({"faithful": False}, {"strength": 0.5}):
        few, all_ = enlarged_both_ways(assembled(tiny_base), monkeypatch, **options)
        assert few == all_


def test_a_model_repeats_its_last_output_and_stays_as_it_was():
    model = torch.nn.Linear(2, 2)
    before = dict(vars(model))
    own = skipping(model, lambda: True)
    first = own(torch.ones(1, 2))
    assert own(torch.zeros(1, 2)) is first
    assert own(torch.ones(3, 2)).shape == (3, 2), "new shapes are a real call"
    assert not torch.equal(model(torch.zeros(1, 2)), first), "the model itself skips nothing"
    assert vars(model) == before
    assert isinstance(own, torch.nn.Linear)
    model.extra = 3
    assert own.extra == 3
    plain = skipping(model, lambda: False)
    assert not torch.equal(plain(torch.ones(1, 2)), plain(torch.zeros(1, 2)))


def test_compiled_in_place_or_hooked_models_keep_both():
    model = torch.nn.Linear(2, 2)
    called = []
    model.register_forward_hook(lambda *_: called.append("hook"))
    own = skipping(model, lambda: False)
    own(torch.ones(1, 2))
    model.compile(backend="eager")
    torch.testing.assert_close(skipping(model, lambda: False)(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert called == ["hook"] * 3


def test_others_draw_with_the_model_in_the_meantime(tiny_base: Path):
    pipeline = assembled(tiny_base)
    other = type(pipeline)(**{**pipeline.components, "scheduler": deepcopy(pipeline.scheduler)})
    other.set_progress_bar_config(disable=True)
    size = default_resolution(pipeline)
    draw = lambda: other("a", height=size, width=size, num_inference_steps=2, generator=torch.Generator().manual_seed(1),  # noqa: E731
                         output_type="latent").images  # fmt: skip
    expected = draw()
    found: list[torch.Tensor] = []
    davae.upscale(pipeline, picture(7, 24, 16), "a", steps=6, on_step=lambda *_: found.append(draw()))
    assert len(found) == 6
    assert all(torch.equal(one, expected) for one in found)


def test_an_error_in_the_first_call_leaves_nothing_behind(tiny_base: Path):
    pipeline = assembled(tiny_base)
    model, vae = pipeline.transformer, pipeline.vae
    before = set(vars(model)), set(vars(vae))

    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    hook = model.register_forward_hook(lambda *_: out_of_memory() if len(seen) > 3 else seen.append(1))
    seen: list[int] = []
    with pytest.raises(MemoryError):
        davae.upscale(pipeline, picture(7, 60, 40), "a", steps=6, batch_size=1)
    hook.remove()
    assert (set(vars(model)), set(vars(vae))) == before
