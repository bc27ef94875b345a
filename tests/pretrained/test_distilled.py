"""Distilled models are recognised by scheduler, config and name; those of a few steps are not trained unasked."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_upgrade_recipe

from davae.errors import RecipeError
from davae.pretrained.distilled import distilled, find_distilled
from davae.recipes import load_recipe, shipped_recipes, validate
from davae.recipes.upgrade import Recipe
from davae.runs.checks import check_distilled, check_recipe
from davae.tasks.base_model import BaseModel
from davae.zoo.presets import presets

FLUX, SD3, UNET = "FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"
SCHNELL = {"guidance_embeds": False, "num_layers": 19, "num_single_layers": 38}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
LIGHTNING = {"base_shift": math.log(3), "max_shift": math.log(3), "use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("name", "pipeline", "kind", "model", "scheduler", "what"),
    [
        # by scheduler
        (
            "a/b",
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel",
            {},
            {"_class_name": "LCMScheduler"},
            "consistency",
        ),
        ("a/b", "StableDiffusionPipeline", UNET, {}, {"_class_name": "TCDScheduler"}, "trajectory"),
        ("a/b", "StableDiffusionXLPipeline", UNET, {}, TURBO, "Turbo"),
        (
            "a/b",
            "HiDreamImagePipeline",
            "HiDreamImageTransformer2DModel",
            {},
            {"_class_name": "FlashFlowMatchX"},
            "dist",
        ),
        ("a/b", "ZImagePipeline", "ZImageTransformer2DModel", {}, {"shift": 3.0}, "Z-Image-Turbo"),
        ("a/b", "QwenImagePipeline", "QwenImageTransformer2DModel", {}, LIGHTNING, "Qwen-Image-Lightning"),
        # by config
        ("a/b", "FluxPipeline", FLUX, SCHNELL, {"shift": 1.0, "use_dynamic_shifting": False}, "FLUX schnell"),
        ("a/b", "StableDiffusionPipeline", UNET, {"time_cond_proj_dim": 256}, {}, "consistency"),
        ("a/b", "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", {"use_meanflow": True}, {}, "HunyuanImage"),
        ("a/b", "SanaSprintPipeline", "SanaTransformer2DModel", {}, {}, "SANA-Sprint"),
        # by name
        ("black-forest-labs/FLUX.1-schnell", "FluxPipeline", FLUX, {}, {}, "schnell"),
        ("stabilityai/sdxl-turbo", "StableDiffusionXLPipeline", UNET, {}, {}, "Turbo"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "StableDiffusion3Pipeline", SD3, {}, {}, "Turbo"),
        ("ByteDance/SDXL-Lightning", "StableDiffusionXLPipeline", UNET, {}, {}, "Lightning"),
        ("ByteDance/Hyper-SD", "StableDiffusionXLPipeline", UNET, {}, {}, "Hyper"),
        ("/models/Hyper-SDXL-8steps", "StableDiffusionXLPipeline", UNET, {}, {}, "Hyper"),
        ("x/sdxl-8step", "StableDiffusionXLPipeline", UNET, {}, {}, "8step"),
        (
            "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel",
            {},
            {},
            "DMD",
        ),
        ("tianweiy/DMD2", "StableDiffusionXLPipeline", UNET, {}, {}, "DMD"),
        ("lightx2v/Qwen-Image-Lightning", "QwenImagePipeline", "QwenImageTransformer2DModel", {}, {}, "Lightning"),
        (
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers-Distilled",
            "HunyuanDiTPipeline",
            "HunyuanDiT2DModel",
            {},
            {},
            "dist",
        ),
        ("HiDream-ai/HiDream-I1-Fast", "HiDreamImagePipeline", "HiDreamImageTransformer2DModel", {}, {}, "HiDream"),
        ("black-forest-labs/FLUX.2-klein-4B", "Flux2KleinPipeline", "Flux2Transformer2DModel", {}, {}, "Klein"),
        ("~/models/sd35-large-turbo/", "StableDiffusion3Pipeline", SD3, {}, {}, "Turbo"),
        ("x", "FluxPipeline", FLUX, {"_name_or_path": "black-forest-labs/FLUX.1-schnell"}, {}, "schnell"),
    ],
)
def test_distilled_to_a_few_steps(
    name: str, pipeline: str, kind: str, model: dict[str, Any], scheduler: dict[str, Any], what: str
) -> None:
    found = find_distilled(name, {"_class_name": pipeline}, kind, model, scheduler)
    assert found is not None
    assert found.kind == "steps"
    assert what in found.what
    assert found.instead


@pytest.mark.parametrize(
    ("name", "kind", "model", "scheduler"),
    [
        ("stabilityai/stable-diffusion-3.5-large", SD3, {}, {"shift": 3.0}),
        ("hustvl/lightningdit-xl-imagenet256", "LightningDiT", {}, {}),
        ("nyanko7/flux-dev-de-distill", FLUX, SCHNELL, {"use_dynamic_shifting": True}),
        ("/fast/turbo/sd3", SD3, {}, {}),
        ("tiny", FLUX, {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 1}, {}),
        ("Tongyi-MAI/Z-Image", "ZImageTransformer2DModel", {}, {"shift": 6.0}),
        ("black-forest-labs/FLUX.2-klein-base-4B", "Flux2Transformer2DModel", {"guidance_embeds": False}, {}),
        ("Qwen/Qwen-Image", "QwenImageTransformer2DModel", {"guidance_embeds": False}, {"base_shift": 0.5}),
        ("stabilityai/stable-diffusion-xl-base-1.0", UNET, {}, {"timestep_spacing": "leading"}),
        ("runs/x/base/pipeline", SD3, {}, {}),
        ("models/lightning-dit", "LightningDiT", {}, {}),
        ("models/lightning_dit_xl", "LightningDiT", {}, {}),
        ("/models/sd15-finetuned-20000-steps", UNET, {}, {}),
        ("/models/sd15-epoch-20-step-4000", UNET, {}, {}),
    ],
)
def test_not_distilled(name: str, kind: str, model: dict[str, Any], scheduler: dict[str, Any]) -> None:
    assert find_distilled(name, {"_class_name": "P"}, kind, model, scheduler) is None


def test_the_parent_of_a_local_folder_is_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_distilled("turbo/sd35", {"_class_name": "P"}, SD3, {}, {}) is not None
    Path("turbo/sd35").mkdir(parents=True)
    assert find_distilled("turbo/sd35", {"_class_name": "P"}, SD3, {}, {}) is None
    assert find_distilled("x/sd35-8-steps", {"_class_name": "P"}, SD3, {}, {}) is not None


def test_guidance_distilled_models_are_noted() -> None:
    found = find_distilled("x/dev", {"_class_name": "FluxPipeline"}, FLUX, {"guidance_embeds": True}, {})
    assert found is not None
    assert found.kind == "guidance"
    assert "guidance-distilled" in found.note("x/dev")
    klein = find_distilled("x", {"is_distilled": True}, "Flux2Transformer2DModel", {}, {})
    assert klein is not None
    assert klein.kind == "steps"


def test_presets_and_shipped_recipes() -> None:
    """Z-Image-Turbo alone is distilled to a few steps; the FLUX presets take guidance as an input."""
    found = {name: distilled(name) for name in presets()}
    assert {name for name, one in found.items() if one and one.kind == "steps"} == {"z-image"}
    assert {name for name, one in found.items() if one and one.kind == "guidance"} == {"flux1-dev", "flux2-dev"}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if isinstance(recipe, Recipe) and recipe.base.model in presets():
            check_distilled(recipe, BaseModel.of(recipe))


def test_a_recipe_of_a_distilled_model_is_refused(tiny_base: Path, tmp_path: Path, caplog: Any) -> None:
    model = shutil.copytree(tiny_base, tmp_path / "sd3-turbo")
    values = tiny_upgrade_recipe(model, tmp_path)
    recipe = validate(values, "x")
    with pytest.raises(
        RecipeError, match=r"base.model: .*sd3-turbo is Turbo .*instead: SD3\.5 Medium.*base\.distilled"
    ):
        check_recipe(recipe, BaseModel(str(model)))  # type: ignore[arg-type]
    values["base"]["distilled"] = "train"
    check_recipe(validate(values, "x"), BaseModel(str(model)))  # type: ignore[arg-type]
    assert "sd3-turbo is Turbo" in caplog.text
    plain = shutil.copytree(tiny_base, tmp_path / "plain")
    check_recipe(validate(tiny_upgrade_recipe(plain, tmp_path), "x"), BaseModel(str(plain)))  # type: ignore[arg-type]
    (plain / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "FlowMatchLCMScheduler"}))
    with pytest.raises(RecipeError, match="FlowMatchLCMScheduler"):
        check_recipe(validate(tiny_upgrade_recipe(plain, tmp_path), "x"), BaseModel(str(plain)))  # type: ignore[arg-type]
