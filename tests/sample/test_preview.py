"""Previews: base latents, decoders of the base, what the steps of a pipeline show."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from upgraded_tiny import assembled

import davae
from davae.backbones.packed_latents import latent_size, pack_like, unpack_latents
from davae.errors import ModelError
from davae.sample.levels import clean_from, clean_of, level_after
from davae.vae.base_decoder import dead_leaves, fit_linear, linear_decoder


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path):
    return assembled(tiny_base)


def test_base_latents_are_what_the_base_s_own_autoencoder_decodes():
    base = tiny_autoencoder()
    vae = davae.DetailVAE.from_base(base, 8)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    z = vae.encode_base(images)
    z_hr = vae.layout.join(z, torch.randn(2, 8, 8, 8))
    torch.testing.assert_close(vae.base_latents(z_hr), base.encode(images).latent_dist.mode())
    torch.testing.assert_close(vae.base_latents(z_hr[:, :, None]), vae.base_latents(z))
    with pytest.raises(ValueError, match="latents have 9 channels"):
        vae.base_latents(torch.zeros(1, 9, 8, 8))
    with pytest.raises(ValueError, match="divisible by 2"):
        vae.encode_base(images[..., :15])


def test_an_attached_base_decoder_travels_and_changes_nothing_else(tmp_path: Path):
    base = tiny_autoencoder(quant=True)
    vae = davae.DetailVAE.from_base(base, 8)
    latents = torch.randn(1, 12, 4, 4)
    before = vae.decode(latents).sample
    with pytest.raises(ValueError, match="no base decoder"):
        vae.decode_base(latents)
    vae.attach_base_decoder(base)
    vae.save_pretrained(tmp_path)
    loaded = davae.DetailVAE.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode_base(latents), base.decode(vae.base_latents(latents)).sample)
    assert torch.equal(loaded.decode(latents).sample, before)
    with pytest.raises(ValueError, match="of 3 channels, the base has 4"):
        vae.attach_base_decoder(davae.PooledAutoencoderTiny(latent_channels=3))


def test_a_tiny_autoencoder_decodes_the_normalised_base():
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    vae = davae.DetailVAE.from_base(tiny_autoencoder(), 8)
    vae.attach_base_decoder(tiny)
    latents = torch.randn(1, 12, 4, 4)
    torch.testing.assert_close(vae.decode_base(latents), tiny.decode(latents[:, :4]).sample)


def test_the_linear_decoder_finds_a_linear_map():
    latents, weight = torch.randn(4, 2, 12, 12), torch.randn(12, 2, 3, 3)
    padded = torch.nn.functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    images = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(padded, weight, torch.ones(12)), 2)
    fitted = fit_linear(latents, images)
    assert float((fitted(latents) - images).abs().max()) < 0.05
    assert dead_leaves(2, 16).shape == (2, 3, 16, 16)
    vae = davae.DetailVAE.from_base(tiny_autoencoder(), 8)
    assert linear_decoder(vae) is linear_decoder(vae)  # fitted once


SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler": EulerDiscreteScheduler,
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm": DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_known_state_follows_each_scheduler_and_two_states_point_to_its_data(name: str):
    """With a perfect model, x = a z + s n at every level, whatever the scheduler; clean_of gives z back."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    pipeline = SimpleNamespace(scheduler=scheduler)
    z, noise = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    x = level_after(pipeline, 0).state(z, noise)
    for number, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
        prediction = noise - z if name == "flow" else noise
        before, x = x, scheduler.step(prediction, t, x).prev_sample
        level = level_after(pipeline, number + 1)
        tolerance = 0.06 if number == 5 and name == "ddim" else 2e-3  # DDIM ends at its first trained level
        torch.testing.assert_close(x.double(), level.state(z, noise), atol=tolerance, rtol=0.02)
        clean = clean_of(pipeline, x, number + 1, before)
        torch.testing.assert_close(clean.double(), z, atol=0.06, rtol=0.05)


def test_two_states_give_the_data_in_closed_form():
    from davae.sample.levels import Level

    z, noise = torch.randn(2, 5, dtype=torch.float64)
    start, end = Level(0.2, 0.9), Level(0.5, 0.6)
    torch.testing.assert_close(clean_from(start.state(z, noise), end.state(z, noise), start, end), z)


@pytest.mark.parametrize("shape", ["plain", "frame", "grid", "tokens", "positions"])
def test_latents_come_back_from_every_packing(shape: str):
    latents = torch.randn(2, 3, 4, 6)
    folded = torch.nn.functional.pixel_unshuffle(latents, 2)
    like = {
        "plain": latents,
        "frame": latents[:, :, None],
        "grid": folded,
        "tokens": folded.flatten(2).transpose(1, 2),
        "positions": latents.flatten(2).transpose(1, 2),
    }[shape]
    assert torch.equal(unpack_latents(like, 4, 6), latents)
    assert torch.equal(pack_like(latents, like), like)
    if shape in ("plain", "frame", "grid"):
        assert latent_size(like, 3) == (4, 6)
    else:
        with pytest.raises(ValueError, match="not a square"):
            latent_size(like, 3)
    with pytest.raises(ValueError, match="are not those of"):
        unpack_latents(torch.zeros(2, 5, 7), 4, 6)


def test_a_stock_pipeline_shows_its_base_and_draws_the_same(pipeline):
    seen = []
    shown = davae.preview(pipeline, every=2, on_preview=lambda step, images: seen.append((step, len(images))))
    options = {"num_inference_steps": 5, "height": 32, "width": 32, "output_type": "np"}
    draw = lambda **more: pipeline(["a", "b"], generator=torch.Generator().manual_seed(1), **options, **more).images  # noqa: E731
    plain, watched = draw(), draw(callback_on_step_end=shown)
    assert np.array_equal(plain, watched)
    assert seen == [(2, 2), (4, 2)]
    assert list(shown.images) == [2, 4]
    assert shown.images[4][0].size == (16, 16)
    with davae.preview(pipeline, every=1, decoder=lambda z: z[:, :3]) as around:
        draw()
    assert list(around.images) == [1, 2, 3, 4, 5]
    assert "step" not in vars(pipeline.scheduler)


def test_the_last_preview_is_the_base_of_the_result(pipeline):
    shown = davae.preview(pipeline, every=4, decoder=lambda z: z[:, :3])
    result = pipeline(
        "a", num_inference_steps=4, height=32, width=32, output_type="latent", callback_on_step_end=shown
    ).images
    expected = pipeline.vae.base_latents(result)[0, :3].clamp(-1, 1)
    found = torch.from_numpy(np.asarray(shown.images[4][0])).permute(2, 0, 1) / 127.5 - 1
    assert float((found - expected).abs().max()) < 0.01


def test_what_cannot_be_previewed_is_one_line(pipeline, tiny_base: Path):
    from davae.pretrained.open import load_pipeline

    with pytest.raises(ModelError, match="without a DetailVAE"):
        davae.preview(load_pipeline(str(tiny_base)))
    with pytest.raises(ModelError, match="every: found 0"):
        davae.preview(pipeline, every=0)
    with pytest.raises(ModelError, match="no base decoder"):
        davae.preview(pipeline, decoder="base")
    with pytest.raises(ModelError, match="'ninear'"):
        davae.preview(pipeline, decoder="ninear")


def test_the_base_decoder_is_an_option_of_whole_pipelines(tmp_path: Path):
    from typer.testing import CliRunner

    from davae.cli import app
    from davae.sample.open import open_autoencoder

    words = ["apply", "micro-upgraded", "--base", "micro", "--out", str(tmp_path / "out"), "--dtype", "float32"]
    for more, has in ((["--base-decoder"], True), ([], False)):
        assert CliRunner().invoke(app, [*words, *more], catch_exceptions=False).exit_code == 0
        vae = davae.DetailVAE.from_pretrained(tmp_path / "out" / "vae")
        assert (vae.base_decoder is not None) == has
        if has:
            base, z = open_autoencoder("micro"), torch.randn(1, 8, 4, 4)
            torch.testing.assert_close(vae.decode_base(z), base.decode(vae.base_latents(z)).sample)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_a_drawing_that_begins_later_shows_the_levels_of_its_own_steps(
    kind, around: bool, pipeline, monkeypatch: pytest.MonkeyPatch
):
    """Image-to-image leaves out the first steps of its scheduler; DDIM's has no `step_index`."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    own, places = pipeline.scheduler, []
    drawer = StableDiffusion3Img2ImgPipeline.from_pipe(pipeline, vae=pipeline.vae)
    monkeypatch.setattr(
        "davae.sample.preview.clean_of",
        lambda p, x, calls, before: places.append(calls) or clean_of(p, x, calls, before),
    )
    if kind is DDIMScheduler:
        scheduler = DDIMScheduler(clip_sample=False)
        drawer = SimpleNamespace(vae=pipeline.vae, scheduler=scheduler, transformer=pipeline.transformer)
        shown, x = davae.preview(drawer, every=1, decoder=lambda z: z[:, :3]), torch.zeros(1, 12, 4, 4)
        for _ in range(2):
            scheduler.set_timesteps(8)
            with shown if around else contextlib.nullcontext():
                for step, t in enumerate(scheduler.timesteps[4:]):
                    x = scheduler.step(x, t, x).prev_sample
                    if not around:
                        shown(drawer, step, t, {"latents": x})
    else:
        shown = davae.preview(drawer, every=1, decoder=lambda z: z[:, :3])
        options = {
            "image": Image.new("RGB", (32, 32)),
            "strength": 0.5,
            "num_inference_steps": 8,
            "height": 32,
            "width": 32,
        }
        with shown if around else contextlib.nullcontext():
            for prompt in "ab":
                drawer(prompt, callback_on_step_end=None if around else shown, **options)
    assert places == 2 * [5, 6, 7, 8]
    assert list(shown.images) == [1, 2, 3, 4]
    assert pipeline.scheduler is own


def test_a_block_ends_as_it_began(pipeline):
    own, options = pipeline.scheduler, {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    with davae.preview(pipeline, every=1) as outer:
        with davae.preview(pipeline, every=2) as inner:
            pipeline("a", **options)
        pipeline("b", **options)
        pipeline.scheduler = type(own).from_config(own.config)
    assert list(outer.images) == [1, 2, 3]
    assert list(inner.images) == [2]
    assert not {"step"} & (set(vars(own)) | set(vars(pipeline.scheduler)))
    pipeline.scheduler = own
