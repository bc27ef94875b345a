"""Noise that schedulers add at their steps depends on the seed and the image's number alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from upgraded_tiny import assembled, upgraded

import davae
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.sample.preview import Preview

STOCHASTIC = {  # none of their pipelines passes a generator on
    "FlowMatchLCM": lambda: FlowMatchLCMScheduler(shift=3.0),
    "stochastic Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
}


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path):
    return assembled(tiny_base)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory):
    pipeline = upgraded("DiTTransformer2DModel", tmp_path_factory.mktemp("dit"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler(clip_sample=False)
    return pipeline


def drawn(pipeline: Any, prompts: list[str], guidance: float = 1.0, **more: Any) -> torch.Tensor:
    names = ("seed", "batch_size")
    settings = {name: more.pop(name) for name in names if name in more}
    options = SamplingOptions(steps=3, guidance=guidance, **settings)
    return torch.stack(generate(pipeline, prompts, options, output_type="pt", **more))


def check_seeds(pipeline: Any, prompts: list[str], **more: Any) -> None:
    own, kept = pipeline.scheduler, set(vars(pipeline.scheduler))
    one = drawn(pipeline, prompts, seed=3, batch_size=1, **more)
    torch.testing.assert_close(drawn(pipeline, prompts, seed=3, batch_size=2, **more), one, atol=1e-4, rtol=1e-3)
    alone = drawn(pipeline, prompts[1:], seed=3, first=1, **more)
    torch.testing.assert_close(alone, one[1:], atol=1e-4, rtol=1e-3)
    assert float((drawn(pipeline, prompts, seed=4, **more) - one).abs().max()) > 0.01
    assert pipeline.scheduler is own
    assert set(vars(own)) <= kept | {"is_scale_input_called"}, "other threads may draw with it"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_seed_draws_and_enlarges_the_same_where_the_pipeline_passes_no_generator(name: str, pipeline):
    pipeline.scheduler = STOCHASTIC[name]()
    check_seeds(pipeline, ["a", "b"])
    enlarge = lambda seed: np.asarray(davae.upscale(pipeline, picture(1, 16, 16), steps=3, seed=seed)[0]).astype(int)  # noqa: E731
    assert np.array_equal(enlarge(7), enlarge(7))
    assert np.abs(enlarge(7) - enlarge(8)).max() > 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_halves_of_guidance_of_dit_get_one_noise(guidance: float, dit):
    check_seeds(dit, ["0", "7"], guidance=guidance)
    shown = Preview(dit, 1, decoder=lambda z: z[:, :3])
    plain = drawn(dit, ["0", "7"], guidance=guidance)
    assert torch.equal(drawn(dit, ["0", "7"], guidance=guidance, preview=shown), plain)
    assert {step: len(images) for step, images in shown.images.items()} == {1: 2, 2: 2, 3: 2}


def test_a_watched_pipeline_draws_the_same(pipeline):
    pipeline.scheduler = STOCHASTIC["FlowMatchLCM"]()
    plain = drawn(pipeline, ["a"])
    with davae.preview(pipeline):
        assert torch.equal(drawn(pipeline, ["a"]), plain)


def test_pipelines_that_pass_a_generator_keep_their_images(tmp_path: Path):
    pipeline = upgraded("UNet2DConditionModel", tmp_path)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    check_seeds(pipeline, ["a", "b"])
