"""A guidance scale means the same in every family, whatever its pipeline counts from or calls it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS
from conftest import step_inputs
from upgraded_tiny import upgraded

import davae
from davae import DetailVAE, expand_transformer
from davae.backbones import pipelines
from davae.backbones.families import family_by_class, family_of
from davae.errors import ModelError
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import pixel_factor, token_side
from davae.publish.assemble import assemble
from davae.sample.call import call_pipeline, takes_noise
from davae.sample.generate import checked_size, generate
from davae.sample.open import SamplingOptions
from davae.sample.preview import takes_callback

PROMPT = "a red square"
FLUX = "FluxTransformer2DModel"


def tiny(name: str, folder: Path, *, embeds: bool = False) -> Any:
    torch.manual_seed(0)
    BUILDERS[name](folder)
    pipeline = load_pipeline(str(folder))
    if name == FLUX and not embeds:
        kind, config = type(pipeline.transformer), pipeline.transformer.config
        pipeline.transformer = kind.from_config({**config, "guidance_embeds": False}).eval()
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "name", [FLUX, "ZImageTransformer2DModel", "Krea2Transformer2DModel", "PRXTransformer2DModel"]
)
def test_a_scale_is_the_share_of_the_prompt_in_every_family(
    name: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipeline = tiny(name, tmp_path)
    seen = step_inputs(pipeline, monkeypatch)
    model, factor = pipeline.transformer, pixel_factor(pipeline)
    side = 2 * token_side(pipeline) // factor
    x = torch.randn(1, pipeline.vae.config.get("latent_channels") or pipeline.vae.config.z_dim, side, side)
    passes: list[int] = []
    model.register_forward_hook(lambda *args: passes.append(1))
    call_pipeline(
        pipeline, [PROMPT], side * factor, latents=x, generator=torch.Generator(), steps=1, guidance_scale=scale
    )
    guided = scale > 1
    assert len(passes) <= 1 + guided
    call = family_of(model).require_call().for_pipeline(factor, pipeline.scheduler)
    parts = call.embed(pipeline, ["", PROMPT], {})
    t = pipeline.scheduler.sigmas[:1].expand(2)
    null, velocity = call.predict(model, model.config, x.expand(2, -1, -1, -1), t, parts).split(1)
    expected = call.pack(null + scale * (velocity - null) if guided else velocity)
    assert float((null - velocity).abs().max()) > 1e-3
    assert float((expected - seen[0].reshape(expected.shape)).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_negative_prompt_acts_or_is_refused(tmp_path: Path):
    options = SamplingOptions(steps=1, resolution=16, guidance=3.0)
    pipeline = tiny(FLUX, tmp_path / "two passes")
    images = [
        generate(pipeline, [PROMPT], options, negative_prompt=text, output_type="pt")[0] for text in ("", "blue")
    ]
    assert not torch.equal(*images)
    with pytest.raises(ModelError, match=r"not guided away from anything here; leave it out$"):
        generate(tiny(FLUX, tmp_path / "input", embeds=True), [PROMPT], options, negative_prompt="blue")


def test_arguments_are_those_of_the_pipeline():
    flux, z_image = family_by_class(FLUX), family_by_class("ZImageTransformer2DModel")
    assert flux.guide({"guidance_embeds": True}, 3.5, 2) == {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
    assert flux.guide({"guidance_embeds": False}, 3.5, 2) == {"true_cfg_scale": 3.5, "negative_prompt": ["", ""]}
    assert [z_image.guide({}, scale, 1)["guidance_scale"] for scale in (0.5, 1.0, 3.5)] == [0.0, 0.0, 2.5]
    assert family_by_class("PRXTransformer2DModel").guide({}, 0.5, 1) == {"guidance_scale": 1.0}
    assert family_by_class("LightningDiT").guide({}, 0.5, 1) == {"guidance_scale": 0.5}


DETAILED = [name for name in davae.__all__ if name.startswith("Detail") and name.endswith("Pipeline")]


@pytest.mark.parametrize("name", DETAILED)
def test_pipelines_of_upgrades_have_the_arguments_of_the_stock_ones(name: str):
    """What davae and diffusers do with a pipeline depends on its signature."""
    kind = getattr(davae, name)
    stock = next(base for base in kind.__mro__ if base.__module__.startswith("diffusers."))
    assert inspect.signature(kind.__call__).parameters == inspect.signature(stock.__call__).parameters
    assert (takes_noise(kind), takes_callback(kind)) == (takes_noise(stock), takes_callback(stock))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_guidance_of_an_untrained_lumina2_is_the_base_s(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its pipeline divides rows by their norms, which are 0 in the new channels."""
    base = tiny("Lumina2Transformer2DModel", tmp_path)
    large = assemble(base, DetailVAE.from_base(base.vae, 4), expand_transformer(base.transformer, 4))
    rows = torch.cat([torch.randn(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)], dim=1).to(dtype)
    monkeypatch.setattr(large.transformer, "forward", lambda *args, **options: (rows,))
    seen = step_inputs(large, monkeypatch)
    large(PROMPT, height=64, width=64, num_inference_steps=1, guidance_scale=3.0, output_type="latent")
    assert torch.equal(seen[0][:, :4], -rows[:, :4])
    assert float(seen[0][:, 4:].abs().max()) < 1e-6
    assert pipelines.TINY > 0
    assert not large.transformer._forward_hooks


def test_a_pipeline_of_one_area_draws_no_other(tmp_path: Path):
    pipeline = upgraded(
        "HiDreamImageTransformer2DModel", tmp_path
    )  # 128 positions of two pixels, tokens of 64 positions
    assert checked_size(pipeline, None) == checked_size(pipeline, 256) == 256
    assert checked_size(pipeline, (128, 512)) == (128, 512)
    for size in (128, 512, (256, 512)):
        with pytest.raises(ModelError, match=r"draws 256 x 256 pixels in all, not \d+ x \d+; use 256$"):
            checked_size(pipeline, size)
