"""Flow-matching transformers that take latents as they are: what guidance, sizes and shifts make of their calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS, CASES
from cases.lumina import lumina2, lumina_next
from cases.others import aura_flow
from cases.pixart import sana, sana_sprint
from conftest import step_inputs, tiny_upgrade_recipe, write_pictures
from diffusers import AuraFlowPipeline, Lumina2Pipeline, SanaPipeline, SanaSprintPipeline

from davae import DetailVAE, expand_transformer
from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import latent_channels
from davae.backbones.families import family_by_class
from davae.backbones.families.cogview import CogView4Call
from davae.backbones.families.others import HiDreamCall
from davae.cost.flops import transformer_flops
from davae.errors import RecipeError
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import pixel_factor
from davae.publish.assemble import assemble
from davae.recipes import validate
from davae.runs.upgrade import Upgrade
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions

PROMPT = "a red square"
HIDREAM = "HiDreamImageTransformer2DModel"
UNPACKED = (
    "SanaTransformer2DModel",
    "AuraFlowTransformer2DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "CogView4Transformer2DModel",
    HIDREAM,
    "PRXTransformer2DModel",
)


def tiny(builder: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    builder(folder)
    return load_pipeline(str(folder))


def upgraded(base: Any, folder: Path, scale: int = 2, detail: int = 8) -> Any:
    """The base with untrained new parts, saved and loaded again."""
    vae = DetailVAE.from_base(base.vae, detail, scale)
    pipeline = assemble(base, vae, expand_transformer(base.transformer, detail))
    pipeline.save_pretrained(folder)
    loaded = model_class(type(pipeline).__name__).from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@torch.no_grad()
@pytest.mark.parametrize("name", UNPACKED)
def test_the_empty_caption_is_what_the_pipeline_guides_away_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One guided step: the pipeline's own mixture of both predictions is the call's."""
    pipeline = tiny(BUILDERS[name], tmp_path)
    seen = step_inputs(pipeline, monkeypatch)
    factor = pixel_factor(pipeline)
    side = 128 if name == HIDREAM else 4 * pipeline.transformer.config["patch_size"]  # HiDream draws one size
    x = torch.randn(1, latent_channels(pipeline.transformer), side, side)
    options: dict[str, Any] = {"height": side * factor, "width": side * factor, "latents": x}
    if name in ("SanaTransformer2DModel", "PRXTransformer2DModel"):
        options["use_resolution_binning"] = False
    if name == "Lumina2Transformer2DModel":
        options["cfg_normalization"] = False
    pipeline(PROMPT, num_inference_steps=1, guidance_scale=3.0, output_type="latent", **options)

    call = family_by_class(name).call.for_pipeline(factor, pipeline.scheduler)
    parts = call.embed(pipeline, ["", PROMPT], {})
    t = pipeline.scheduler.sigmas[:1].expand(2)
    null, velocity = call.predict(
        pipeline.transformer, pipeline.transformer.config, x.expand(2, -1, -1, -1), t, parts
    ).split(1)
    guided = null + 3.0 * (velocity - null)
    if name == "LuminaNextDiT2DModel":
        guided[:, 3:] = velocity[:, 3:]  # its pipeline guides three channels
    assert float((null - velocity).abs().max()) > 1e-3
    assert float((guided - seen[0]).abs().max()) < 1e-4 * float(guided.abs().max())


@pytest.mark.parametrize("name", UNPACKED)
def test_flops_are_counted_without_weights(name: str):
    side = 2 * CASES[name].config["patch_size"]
    with torch.device("meta"):
        model = CASES[name].build(name)
    assert transformer_flops(model, 2 * side).total > transformer_flops(model, side).total > 0


def test_lumina2_keeps_the_base_s_shift(tmp_path: Path):
    base = tiny(lumina2, tmp_path / "base")
    large = upgraded(base, tmp_path / "upgraded")
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0}
    schedules = []
    for pipeline, pixels in ((base, 32), (large, 64), (Lumina2Pipeline(**large.components), 32)):
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(PROMPT, height=pixels, width=pixels, **options).images
        assert latents.shape[-2:] == (4, 4)  # the stock class counts 8 pixels a position also where there are 16
        schedules.append(pipeline.scheduler.sigmas)
    assert torch.allclose(schedules[0], schedules[1], atol=1e-7)
    assert not torch.allclose(schedules[0], schedules[2], atol=1e-4)  # the stock class takes it from the channels
    with pytest.raises(ValueError, match="height is 33; it must be divisible by 2"):
        large(PROMPT, height=33, width=64)


def test_aura_flow_draws_more_pixels_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    large = upgraded(tiny(aura_flow, tmp_path / "base"), tmp_path / "upgraded", scale=4)
    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        AuraFlowPipeline, "check_inputs", lambda self, prompt, height, width, *a, **k: asked.append((height, width))
    )
    monkeypatch.setattr(AuraFlowPipeline, "encode_prompt", lambda *args, **options: 1 / 0)
    for options in ({}, {"height": 512}):
        with pytest.raises(ZeroDivisionError):
            large(PROMPT, **options)
    assert asked == [(4096, 4096), (512, 4096)]


@pytest.mark.parametrize(("scale", "detail"), [(2, 4), (4, 12)])
def test_sana_chooses_its_sizes_by_the_upgraded_picture(scale: int, detail: int, tmp_path: Path):
    base = tiny(sana, tmp_path / "base")
    large = upgraded(base, tmp_path / "upgraded", scale, detail)
    assert type(large) is SanaPipeline
    assert pixel_factor(large) == large.vae_scale_factor == 32 * scale
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "complex_human_instruction": None}
    for ratio in (1, 2):  # with binning: the same tokens as the base, also in a picture twice as wide
        shape = base(PROMPT, height=512, width=512 * ratio, **options).images.shape
        assert shape[-2:] == {1: (16, 16), 2: (11, 22)}[ratio]
        size = {"height": 512 * scale, "width": 512 * ratio * scale}
        found = large(PROMPT, **size, **options).images.shape
        # tables of a larger size are no exact multiples: a token more or less at the sides
        assert all(abs(a - b) <= 1 for a, b in zip(found[-2:], shape[-2:], strict=True))
        assert ratio > 1 or found[-2:] == shape[-2:]
    # positions are spaced as in the base: step 0 is the pretrained velocity on any grid
    x, z_d = torch.randn(1, 4, 6, 6), torch.randn(1, detail, 6, 6)
    case = CASES["SanaTransformer2DModel"]
    with torch.no_grad():
        wide = case.run(large.transformer, large.vae.layout.join(x, z_d))
        assert torch.allclose(wide[:, :4], case.run(base.transformer, x), atol=1e-5)
    pixels = 32 * scale
    assert generate(large, [PROMPT], SamplingOptions(resolution=pixels, steps=1))[0].size == (pixels, pixels)


def test_sprint_runs_upgraded_and_is_not_trained(tmp_path: Path):
    base = tiny(sana_sprint, tmp_path / "base")
    large = upgraded(base, tmp_path / "upgraded")
    assert type(large) is SanaSprintPipeline
    options: dict[str, Any] = {"num_inference_steps": 2, "use_resolution_binning": False}
    assert large(PROMPT, height=128, width=128, **options).images[0].size == (128, 128)
    assert transformer_flops(base.transformer.to("meta"), 2).total > 0  # with its guidance input
    pictures = write_pictures(tmp_path / "pictures", 128, 128)
    recipe = validate(tiny_upgrade_recipe(tmp_path / "base", pictures, base__resolution=64), "sprint")
    with pytest.raises(RecipeError, match=r"base\.model: .* SanaSprintPipeline.*SANA-1\.5"):
        Upgrade(recipe, tmp_path / "run", lambda progress: None)  # type: ignore[arg-type]


def test_checkpointing_that_a_class_lacks_is_refused_before_training(tmp_path: Path):
    torch.manual_seed(0)
    lumina_next(tmp_path / "base")
    values = tiny_upgrade_recipe(tmp_path / "base", tmp_path, stage2__gradient_checkpointing=True)
    recipe = validate(values, "lumina")
    with pytest.raises(
        RecipeError, match=r"stage2\.gradient_checkpointing: diffusers' LuminaNextDiT2DModel has none"
    ):
        Upgrade(recipe, tmp_path / "run", lambda progress: None)  # type: ignore[arg-type]


def test_cogview4_calls_prompts_of_other_lengths_apart():
    model = CASES["CogView4Transformer2DModel"].build("CogView4Transformer2DModel")
    call = CogView4Call(pixel_factor=16)
    x, t = torch.randn(3, 4, 8, 8), torch.rand(3)
    embeds = torch.randn(3, 48, 8)
    mask = torch.arange(48)[None] < torch.tensor([[16], [48], [16]])
    with torch.no_grad():
        together = call.predict(model, model.config, x, t, (embeds, mask.float()))
        for i in range(3):
            row = slice(i, i + 1)
            alone = call.predict(model, model.config, x[row], t[row], (embeds[row], mask[row].float()))
            assert torch.allclose(together[row], alone, atol=1e-5)
        other = CogView4Call(pixel_factor=8).predict(model, model.config, x, t, (embeds, mask.float()))
    assert not torch.allclose(other, together, atol=1e-5)  # it is told the size in pixels


def test_hidream_s_experts_learn():
    model = CASES[HIDREAM].build(HIDREAM, patch_size=2)
    call = HiDreamCall()
    x, t = torch.randn(2, 4, 8, 4), torch.rand(2)  # not square: the class pads such tokens
    parts = (torch.randn(2, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 8))
    with torch.no_grad():
        drawn = call.predict(model, model.config, x, t, parts)
    trained = call.predict(model, model.config, x, t, parts)
    assert torch.allclose(trained, drawn, atol=1e-5)  # patches of training mode are put back in order
    trained.square().mean().backward()
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in experts)
