"""FLUX.1 from a tiny base of the real classes to an upgraded stock pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BUILDERS
from conftest import tiny_upgrade_recipe
from diffusers import FluxPipeline, FluxTransformer2DModel

import davae
from davae.backbones.families.flux import FluxCall
from davae.evaluate.generation import evaluate_generation
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import read_shapes
from davae.recipes import validate
from davae.runs.upgrade import Upgrade
from davae.sample.generate import base_noise, generate
from davae.sample.open import SamplingOptions


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux") / "base"
    BUILDERS["FluxTransformer2DModel"](folder)
    return folder


def test_packing_is_the_pipeline_s():
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(FluxCall().pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 4, 6))


def test_velocity_is_the_pipeline_s_call(tiny_flux: Path):
    model = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer").eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.3])
    embeds, pooled = (
        torch.randn(1, 5, model.config.joint_attention_dim),
        torch.randn(1, model.config.pooled_projection_dim),
    )
    with torch.no_grad():
        mine = FluxCall().predict(model, model.config, x, t, (embeds, pooled))
        tokens = model(
            hidden_states=FluxPipeline._pack_latents(x, 1, 4, 8, 8),
            timestep=t,
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(5, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
            return_dict=False,
        )[0]
    # height and width in pixels of an f8 autoencoder
    assert torch.equal(mine, FluxPipeline._unpack_latents(tokens, 64, 64, 8))


def test_upgrade_gives_a_stock_pipeline_at_the_doubled_size(tiny_flux: Path, picture_folder: Path, tmp_path: Path):
    shapes = read_shapes(str(tiny_flux))
    assert (shapes.channels, shapes.patch_size) == (4, 2)
    recipe = validate(tiny_upgrade_recipe(tiny_flux, picture_folder), "flux")
    run = Upgrade(recipe, tmp_path / "run", lambda progress: None)  # type: ignore[arg-type]
    pipeline = run.run()
    upgraded = FluxPipeline.from_pretrained(pipeline)
    assert isinstance(upgraded.vae, davae.DetailVAE)
    assert upgraded.transformer.config.in_channels == 4 * 12
    picture = upgraded("a red square", height=32, width=32, num_inference_steps=2, max_sequence_length=16).images[0]
    assert picture.size == (32, 32)

    # base and upgraded start from the same base noise, packed as the pipeline wants it
    base = load_pipeline(str(tiny_flux))
    assert generate(base, ["a red square"], SamplingOptions(resolution=16, steps=1))[0].size == (16, 16)
    assert generate(upgraded, ["a red square"], SamplingOptions(resolution=32, steps=1))[0].size == (32, 32)
    assert base_noise(0, 0, 4, 8, 8).shape == (1, 4, 8, 8)
    figures = evaluate_generation(
        str(tmp_path / "run"),
        str(picture_folder),
        SamplingOptions(steps=1, guidance=3.5, seed=0, resolution=32, batch_size=32),
        num=4,
        compare_at=None,
        held_in=0.0,
        features="lite0",
        feature_weights=None,
        on_batch=lambda done, total: None,
    )
    assert figures["generated"] == 4
