"""Every family's call is the one that its stock pipeline makes: an Euler loop over it walks the pipeline's own path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from davae import DetailVAE, expand_transformer
from davae.backbones.expand import latent_channels
from davae.backbones.families import denoiser, family_of
from davae.plan.figures import token_plan
from davae.pretrained.open import load_pipeline
from davae.pretrained.prompting import guidance_arguments, literal_prompts, text_arguments
from davae.pretrained.shapes import default_resolution, pixel_factor, read_shapes
from davae.publish.assemble import assemble
from davae.sample.call import takes_noise
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions

PROMPTS = ["a red square", "a blue square of another length"]


def like_the_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Pipelines pack latents before their loop, or take them packed: values (B,c,h,w) or (B,L,c) in the loop's form."""
    return values.flatten(2).transpose(1, 2) if values.ndim == 4 and sample.ndim == 3 else values


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny pipeline folder, built once."""

    @functools.cache
    def build(name: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("family")
        BUILDERS[name](folder)
        return folder

    return build


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_an_euler_loop_over_the_call_is_the_pipeline_s(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    pipeline = load_pipeline(str(folder_of(name)))
    if name.startswith("HiDream"):
        pytest.skip("its pipeline takes latents of one area alone: compared step by step in test_unpacked_calls.py")
    if not hasattr(pipeline.scheduler, "sigmas"):
        pytest.skip("no flow-matching scheduler: compared with its own scheduler in the family's tests")
    shapes, transformer = read_shapes(str(folder_of(name))), pipeline.transformer
    call, config = family_of(transformer).call, transformer.config
    steps: list[tuple[Tensor, Tensor]] = []
    stock_step = pipeline.scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        steps.append((sample.clone(), model_output.clone()))
        return stock_step(model_output, timestep, sample, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    side = 4 * shapes.patch_size
    x = torch.randn(2, shapes.channels, side, side + shapes.patch_size * 2)
    parts = call.embed(pipeline, list(PROMPTS), text_arguments(pipeline))
    assert all(len(part) == len(PROMPTS) for part in parts)
    pipeline(
        prompt=list(PROMPTS),
        height=side * shapes.vae_factor,
        width=(side + shapes.patch_size * 2) * shapes.vae_factor,
        num_inference_steps=2,
        latents=call.pack(x),
        output_type="latent",
        **guidance_arguments(pipeline, no_guidance(pipeline, call), len(PROMPTS)),
        **text_arguments(pipeline),
        **literal_prompts(pipeline),
    )
    sigmas = pipeline.scheduler.sigmas
    assert len(steps) == 2
    for (sample, output), now, then in zip(steps, sigmas[:-1], sigmas[1:], strict=True):
        assert float((like_the_sample(call.pack(x), sample) - sample).abs().max()) < 1e-4
        velocity = call.predict(transformer, config, x, now.expand(len(x)), parts)
        assert velocity.shape == x.shape
        assert float(output.abs().max()) > 1e-3
        difference = like_the_sample(call.pack(velocity), output) - output
        assert float(difference.abs().max()) < 1e-4 * float(output.abs().max())
        x = x + (then - now) * velocity


def no_guidance(pipeline: Any, call: Any) -> float:
    """The scale at which a pipeline makes one pass a step; a distilled model is asked for what its call trains it at."""
    if pipeline.transformer.config.get("guidance_embeds"):
        return call.GUIDANCE
    return 1.0


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_flops_counted_without_weights_are_those_of_a_real_pass(name: str, folder_of: Callable[[str], Path]):
    shapes = read_shapes(str(folder_of(name)))
    size = 4 * shapes.vae_factor * shapes.patch_size
    model = denoiser(load_pipeline(str(folder_of(name))))
    call = family_of(model).call
    parts = tuple(torch.ones_like(part) for part in call.blank(model.config))
    x = torch.randn(1, shapes.channels, size // shapes.vae_factor, size // shapes.vae_factor)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call.predict(model, model.config, x, torch.full((1,), 0.5), parts)
    # a token of modulation more or less, where text is modulated at another time than the picture
    assert token_plan(shapes, size, 2).native_flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


class Stopped(Exception):
    """The transformer was called."""


def drawn_by_default(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    """(latent positions, mu of the timestep shift) of the pipeline's first call of its model when no size is asked for."""
    seen: list[Any] = []
    stock_timesteps = pipeline.scheduler.set_timesteps

    @functools.wraps(stock_timesteps)  # pipelines look for its arguments
    def set_timesteps(*args: Any, **options: Any) -> None:
        seen.append(options.get("mu"))
        stock_timesteps(*args, **options)

    def forward(*args: Any, **options: Any) -> None:
        latents = args[0] if args else options["hidden_states"]
        sample = latents[0]  # (c,h,w), or (L,c) where they are packed into tokens
        seen.append(len(sample) if sample.ndim == 2 else sample[0].numel())
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.scheduler, "set_timesteps", set_timesteps)
        patch.setattr(denoiser(pipeline), "forward", forward)
        with pytest.raises(Stopped):
            pipeline(
                prompt=list(PROMPTS), num_inference_steps=3, **text_arguments(pipeline), **literal_prompts(pipeline)
            )
    return seen[-1], seen[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_an_upgrade_by_four_draws_the_base_s_tokens(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = load_pipeline(str(folder_of(name)))
    if not takes_noise(base):
        pytest.skip("drawn by class: its size is its grid's (test_diffusion_calls.py)")
    model = denoiser(base)
    detail = 3 * latent_channels(model)
    vae = DetailVAE.from_base(base.vae, detail, 4)
    upgraded = assemble(base, vae, expand_transformer(model, detail))
    upgraded.save_pretrained(tmp_path / "upgraded")
    upgraded = type(upgraded).from_pretrained(tmp_path / "upgraded")
    upgraded.set_progress_bar_config(disable=True)
    assert pixel_factor(upgraded) == 4 * pixel_factor(base)
    assert default_resolution(upgraded) == 4 * default_resolution(base)
    tokens, mu = drawn_by_default(base, monkeypatch)
    assert drawn_by_default(upgraded, monkeypatch) == (tokens, mu)
    shapes = read_shapes(str(folder_of(name)))
    size = 2 * shapes.patch_size * pixel_factor(upgraded)
    # Lumina 2 guides too: it normalises guided predictions, and the new rows of its head are zero
    guidance = 3.0 if name.startswith("Lumina2") else 1.0
    drawn = generate(upgraded, ["a red square"], SamplingOptions(resolution=size, steps=1, guidance=guidance))
    assert drawn[0].size == (size, size)
