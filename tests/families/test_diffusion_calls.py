"""Calls of the families trained by DDPM: what the stock pipelines feed their models, base and upgraded."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS, VARIANTS
from conftest import tiny_upgrade_recipe
from diffusers import DDIMScheduler
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

from davae.backbones.call import SizedCall
from davae.backbones.classes import class_number
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser, family_of
from davae.backbones.pipelines import ScaledBins
from davae.errors import ModelError, RecipeError
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import default_resolution, pixel_factor, read_shapes
from davae.publish.assemble import assemble
from davae.recipes import validate
from davae.runs.checks import check_recipe
from davae.sample.generate import base_noise, generate
from davae.sample.open import SamplingOptions, check_class_prompts
from davae.tasks.base_model import BaseModel
from davae.vae.detail_vae import DetailVAE

BY_DDPM = (
    "PixArtTransformer2DModel",
    "HunyuanDiT2DModel",
    "DiTTransformer2DModel",
    "CogView3PlusTransformer2DModel",
    "UNet2DConditionModel",
)
FAMILIES = {**{name: BUILDERS[name] for name in BY_DDPM}, **VARIANTS}
PROMPTS = ["a red square", "a blue square"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp("ddpm") / "base" for name in FAMILIES}
    for name, folder in folders.items():
        FAMILIES[name](folder)
    return folders


def upgraded(pipeline: Any) -> Any:
    """The pipeline's upgrade at step 0."""
    vae = DetailVAE.from_base(pipeline.vae, 8)
    return assemble(pipeline, vae, expand_transformer(denoiser(pipeline), 8))


def fed(pipeline: Any, size: int, guidance: float, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """(arguments by name, output) of the model's first pass in a call of the pipeline."""
    model, seen = denoiser(pipeline), []
    forward, signature = model.forward, inspect.signature(model.forward)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((signature.bind(*args, **kwargs).arguments, forward(*args, **kwargs)))
        return seen[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", spy)
        generate(pipeline, PROMPTS, SamplingOptions(resolution=size, steps=2, guidance=guidance))
    arguments, output = seen[0]
    return arguments, output[0]


def same(ours: Any, theirs: Any) -> bool:
    """Equal values; one of a whole batch may stand for all of them."""
    if isinstance(theirs, dict):
        return all(same(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, tuple):
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if theirs is None or isinstance(theirs, bool):
        return ours is theirs
    return torch.equal(ours.to(theirs.dtype), theirs.expand(ours.shape))


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True], ids=["base", "upgraded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_feeds_what_the_pipeline_feeds(
    name: str, wide: bool, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    pipeline = load_pipeline(str(bases[name]))
    size = 4 * pixel_factor(pipeline)
    if wide:
        pipeline, size = upgraded(pipeline), 2 * size
    theirs, output = fed(pipeline, size, 1.0, monkeypatch)
    model = denoiser(pipeline)
    call = family_of(model).call
    if isinstance(call, SizedCall):
        call = replace(call, pixel_factor=pixel_factor(pipeline))
    if name.startswith("DiT"):
        parts = (torch.tensor([class_number(pipeline, prompt) for prompt in PROMPTS]),)
    else:
        parts = call.embed(pipeline, PROMPTS, {})
    seen: dict[str, Any] = {}
    signature = inspect.signature(model.forward)

    def recorder(*args: Any, **kwargs: Any) -> Any:
        seen.update(signature.bind(*args, **kwargs).arguments)
        return model(*args, **kwargs)

    x = theirs["sample" if "sample" in theirs else "hidden_states"]
    t = theirs["timestep"].expand(2)
    prediction = call.predict(recorder, model.config, x, t, parts)  # type: ignore[arg-type]
    for argument, value in theirs.items():
        if argument not in ("return_dict", "timestep_cond", "cross_attention_kwargs"):
            assert same(seen[argument], value), argument
    assert prediction.shape == x.shape
    assert torch.equal(prediction, output[:, : x.shape[1]])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("DiT")])
def test_a_dropped_caption_is_what_guidance_goes_away_from(
    name: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    pipeline = load_pipeline(str(bases[name]))
    theirs, _ = fed(pipeline, 4 * pixel_factor(pipeline), 2.0, monkeypatch)
    parts = family_of(pipeline).call.embed(pipeline, ["", PROMPTS[1]], {})
    keys = ["encoder_hidden_states"]
    keys += [key for key in ("encoder_attention_mask", "text_embedding_mask") if key in theirs]
    assert all(torch.equal(part[0], theirs[key][0]) for key, part in zip(keys, parts, strict=False))
    assert all(torch.equal(part[1], theirs[key][3]) for key, part in zip(keys, parts, strict=False))
    if name == "SDXL":
        assert torch.equal(parts[1], theirs["added_cond_kwargs"]["text_embeds"][[0, 3]])
    assert not torch.equal(parts[0][0], parts[0][1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "PixArt-Sigma", "UNet2DConditionModel"])
def test_an_untrained_upgrade_draws_the_base_s_latents(name: str, bases: dict[str, Path]):
    base = load_pipeline(str(bases[name]))
    # deterministic: noise that a step adds is drawn for all channels at once
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    size = 4 * pixel_factor(base)
    options = SamplingOptions(steps=3, guidance=3.0, resolution=size)
    expected = torch.stack(generate(base, PROMPTS, options, output_type="latent"))
    drawn = torch.stack(
        generate(upgraded(base), PROMPTS, replace(options, resolution=2 * size), output_type="latent")
    )
    assert drawn.shape[1:] == (12, 4, 4)
    assert float((drawn[:, :4] - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_pixart_scales_its_table_of_sizes(bases: dict[str, Path]):
    bins = ScaledBins(vae_scale_factor=16, scale=2)
    assert bins.classify_height_width_bin(2048, 2048, ASPECT_RATIO_1024_BIN) == (2048, 2048)
    assert bins.classify_height_width_bin(1000, 2000, ASPECT_RATIO_1024_BIN) == (2 * 704, 2 * 1408)
    for name in ("PixArtTransformer2DModel", "PixArt-Sigma"):
        pipeline = upgraded(load_pipeline(str(bases[name])))
        latents = pipeline("a red square", num_inference_steps=1, output_type="latent").images
        # the table's 256 pixels, doubled, at 4 pixels per position; stock would have drawn 64
        assert latents.shape == (1, 12, 128, 128)


@torch.no_grad()
def test_hunyuan_draws_by_default_what_its_table_says(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    pipeline = upgraded(load_pipeline(str(bases["HunyuanDiT2DModel"])))
    seen: list[torch.Tensor] = []
    forward = pipeline.transformer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["image_meta_size"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", spy)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    assert pipeline("a red square", 2048, 2048, **options).images.shape == (1, 12, 128, 128)
    assert seen[0].tolist() == [[1024, 1024, 1024, 1024, 0, 0]]  # the base's pixels
    assert not pipeline.transformer._forward_pre_hooks


def test_dit_draws_classes_by_name(bases: dict[str, Path]):
    base = load_pipeline(str(bases["DiTTransformer2DModel"]))
    assert [class_number(base, label) for label in ("a disc", "disc", "square", "7", "999")] == [7, 7, 0, 7, 999]
    with pytest.raises(
        ModelError, match=r"'cat' is not a class of this model; its classes are a blue square, a disc"
    ):
        check_class_prompts(base, ["cat"])
    with pytest.raises(ModelError, match="class label 1000 is out of range"):
        check_class_prompts(base, ["1000"])
    own = default_resolution(base)
    pictures = generate(base, ["disc", "7"], SamplingOptions(steps=2, seed=3))
    assert pictures[0].size == (own, own)
    assert generate(base, ["disc"], SamplingOptions(steps=2, resolution=2 * own))[0].size == (2 * own, 2 * own)
    assert base.transformer.config["sample_size"] == 4
    wide = upgraded(base)
    assert wide.labels == base.labels
    assert wide.config["id2label"] == {"0": "a red square, square", "1": "a blue square", "7": "a disc"}


@torch.no_grad()
def test_dit_shares_its_noise_with_its_upgrade(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    base = load_pipeline(str(bases["DiTTransformer2DModel"]))
    wide = upgraded(base)
    narrow, _ = fed(base, 8, 1.0, monkeypatch)
    expanded, _ = fed(wide, 16, 1.0, monkeypatch)
    assert torch.equal(narrow["hidden_states"][1:], base_noise(0, 1, 4, 4, 4))
    assert torch.equal(expanded["hidden_states"][:, :4], narrow["hidden_states"])


def test_dit_guides_only_thousand_classes(tmp_path: Path, bases: dict[str, Path]):
    base = load_pipeline(str(bases["DiTTransformer2DModel"]))
    base.transformer.register_to_config(num_embeds_ada_norm=10)
    with pytest.raises(ModelError, match="guides away from class 1000, this model has 10 classes"):
        generate(base, ["1"], SamplingOptions(steps=1, guidance=4.0))


def test_official_folders_of_dit_and_pixart_name_an_older_class(bases: dict[str, Path], tmp_path: Path):
    for name in ("DiTTransformer2DModel", "PixArtTransformer2DModel"):
        folder = tmp_path / name
        load_pipeline(str(bases[name])).save_pretrained(folder)
        for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
            file.write_text(file.read_text().replace(name, "Transformer2DModel"))
        assert read_shapes(str(folder)).transformer_class == name
        assert type(denoiser(load_pipeline(str(folder)))).__name__ == name


def test_a_class_conditional_model_is_upgraded_at_its_own_size(bases: dict[str, Path], tmp_path: Path):
    base = bases["DiTTransformer2DModel"]
    recipe = validate(tiny_upgrade_recipe(base, tmp_path, base__resolution=16), "x")
    with pytest.raises(RecipeError, match=r"base.resolution: .* draws 8 pixels and no other size; use 8"):
        check_recipe(recipe, BaseModel(str(base)))  # type: ignore[arg-type]
