"""stage2.linear_skip and stage2.detail_prediction in whole runs: moments, resume, sharing, exports, error lines."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import tiny_upgrade_recipe
from safetensors.torch import load_file
from test_lightning_dit import random_model, small_autoencoder

from davae import ClassConditionalPipeline, LightningDiT
from davae.app.checkpoint_images import checkpoint_images, newest_images_of
from davae.data.latent_cache.moments import latent_moments
from davae.data.latent_cache.read import CachedLatents
from davae.errors import Interrupted, RecipeError
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import UPGRADE_FILE
from davae.publish.export import apply, export
from davae.publish.upgrade_file import find_upgrade
from davae.recipes import Recipe, validate
from davae.recipes.sections import Lora
from davae.runs.checks import check_init
from davae.runs.upgrade import Upgrade
from davae.train.loop import Progress
from davae.train.run_folder import read_metrics

CHANGES = {
    "stage1__max_steps": 1,
    "stage1__alignment": "constant",
    "stage2__max_steps": 4,
    "stage2__warmup_steps": 1,
    "stage2__linear_skip": True,
    "stage2__detail_prediction": "x0",
    "stage2__detail_scale": 0.5,
    "stage2__clean_base": 0.5,
    "stage2__cosine_loss": "all",
    "sampling__prompts": [],
    "run__checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = random_model(torch.float32, hidden_size=16, num_classes=2, use_qknorm=True)
    folder = tmp_path_factory.mktemp("lightning")
    ClassConditionalPipeline(small_autoencoder(), model, class_names=["golf ball", "tench"]).save_pretrained(folder)
    return folder


def recipe_of(base: Path, data: Path, **changes: object) -> Recipe:
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(base, data, **{**CHANGES, **changes})}, "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def run(recipe: Recipe, out: Path, stop_at: int | None = None, stage1: Path | None = None) -> Upgrade:
    def watch(progress: Progress) -> None:
        if progress.task == "stage2" and progress.step == stop_at:
            signal.raise_signal(signal.SIGINT)

    upgrade = Upgrade(recipe, out, watch, stage1=stage1)
    try:
        upgrade.run()
    except Interrupted:
        assert stop_at is not None
    finally:
        upgrade.folder.close()
    return upgrade


@pytest.fixture(scope="module")
def finished(base: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(recipe_of(base, classes), out)
    return out


def draw(folder: Path | str) -> torch.Tensor:
    pipeline = load_pipeline(str(folder))
    noise = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipeline(1, num_inference_steps=3, latents=noise, output_type="latent").images


def test_a_run_exports_the_moments_of_its_cache(finished: Path, base: Path):
    transformer = LightningDiT.from_pretrained(finished / "pipeline" / "transformer")
    assert transformer.config["head_options"] == {"base_channels": 4, "linear_skip": True, "prediction": "x0"}
    vae = find_upgrade(str(finished)).vae
    statistics = load_pipeline(str(finished / "pipeline")).vae.statistics
    assert json.loads((vae / "config.json").read_text())["detail_std"] is not None
    mean, covariance = latent_moments(CachedLatents(finished / "cache", "class"), statistics)
    torch.testing.assert_close(
        covariance.diagonal()[4:].mean(), torch.tensor(0.25).double(), rtol=1e-3, atol=0
    )  # c^2
    linear = transformer.detail_head.linear
    torch.testing.assert_close(linear.mean.double(), mean, rtol=1e-5, atol=1e-6)
    again = linear.directions @ linear.variances.diag() @ linear.directions.T
    torch.testing.assert_close(again.double(), covariance, rtol=1e-3, atol=2e-4)  # the smallest variance is a floor


def test_resuming_is_exact_to_the_bit(finished: Path, base: Path, classes: Path, tmp_path: Path):
    recipe = recipe_of(base, classes)
    run(recipe, tmp_path / "out", stop_at=2)
    assert not (tmp_path / "out" / "pipeline").exists()
    newest = newest_images_of(tmp_path / "out")
    assert newest is not None
    assert len(checkpoint_images(tmp_path / "out", newest)) == 2
    run(recipe, tmp_path / "out")
    for name in (UPGRADE_FILE, "pipeline/transformer/diffusion_pytorch_model.safetensors"):
        mine, theirs = load_file(tmp_path / "out" / name), load_file(finished / name)
        assert mine.keys() == theirs.keys()
        assert {"detail_head.linear.mean", "detail_head.linear.directions"} < mine.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    last = [read_metrics(folder / "metrics.jsonl")[-1]["loss"] for folder in (tmp_path / "out", finished)]
    assert last[0] == last[1]


def test_exports_draw_the_same_latents(finished: Path, base: Path, tmp_path: Path):
    expected = draw(finished / "pipeline")
    assert bool(torch.isfinite(expected).all())
    fused = export(finished, tmp_path / "fused", "fused", torch.float32, self_contained=True)
    assert torch.equal(draw(fused), expected)
    small = export(finished, tmp_path / "small", "upgrade", torch.float32)
    applied = apply(find_upgrade(str(small)), str(base), tmp_path / "applied", torch.float32)
    assert torch.equal(draw(applied), expected)
    stock = ClassConditionalPipeline.from_pretrained(finished / "pipeline")
    assert stock.transformer.detail_head is not None


def test_another_run_shares_stage_1_and_takes_moments_of_its_own_scale(
    finished: Path, base: Path, classes: Path, tmp_path: Path
):
    changes = {"stage2__max_steps": 1, "stage2__detail_scale": 1.0, "stage2__detail_prediction": "base"}
    changes["stage2__detail_offset"] = 0.2  # both levels are known to the skip
    upgrade = run(recipe_of(base, classes, **changes), tmp_path / "second", stage1=finished)
    transformer = LightningDiT.from_pretrained(upgrade.out / "pipeline" / "transformer")
    linear = transformer.detail_head.linear
    own = (linear.directions**2 @ linear.variances)[4:].mean()
    assert float(own) == pytest.approx(1.0, rel=1e-2)
    assert not transformer.detail_head.predicts_x0
    assert transformer.detail_time is not None
    assert bool(torch.isfinite(draw(upgrade.out / "pipeline")).all())


def test_to_go_on_from_an_upgrade_takes_its_head_and_moments(
    finished: Path, base: Path, classes: Path, tmp_path: Path
):
    small = export(finished, tmp_path / "small", "upgrade", torch.float32)
    changes = {"stage2__max_steps": 1}
    recipe = recipe_of(base, classes, **changes).model_copy(update={"init": str(small)})
    upgrade = run(recipe, tmp_path / "on")
    first, second = (
        LightningDiT.from_pretrained(folder / "pipeline" / "transformer").detail_head.linear
        for folder in (finished, tmp_path / "on")
    )
    assert torch.equal(first.directions, second.directions)
    other = recipe_of(base, classes, **changes, stage2__linear_skip=False).model_copy(update={"init": str(small)})
    with pytest.raises(RecipeError, match=r"stage2: linear_skip is False .* with True and x0; set them alike"):
        check_init(other, upgrade.base.shapes)


@pytest.mark.parametrize("key", ["linear_skip", "detail_prediction"])
def test_models_of_other_classes_are_refused_before_any_work(
    tiny_base: Path, picture_folder: Path, tmp_path: Path, key: str
):
    changes = {"stage2__linear_skip": key == "linear_skip", "stage2__detail_prediction": "base"}
    if key == "detail_prediction":
        changes["stage2__detail_prediction"] = "x0"
    with pytest.raises(
        RecipeError, match=rf"stage2\.{key}: a SD3Transformer2DModel is a class of diffusers.*leave it out"
    ):
        Upgrade(recipe_of(tiny_base, picture_folder, **changes), tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_model_of_epsilon_is_refused(classes: Path, tmp_path: Path):
    from diffusers import DDIMScheduler

    model = random_model(torch.float32, hidden_size=16, num_classes=2, prediction_type="epsilon")
    ClassConditionalPipeline(small_autoencoder(), model, DDIMScheduler()).save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"stage2\.linear_skip: .* predicts epsilon, this option is for velocities"):
        Upgrade(recipe_of(tmp_path / "base", classes, stage2__cosine_loss="off"), tmp_path / "out", lambda _: None)


def test_both_are_off_by_default():
    recipe = tiny_upgrade_recipe(Path("base"), Path("data"))
    found = validate({"kind": "upgrade", **recipe}, "tiny")
    assert isinstance(found, Recipe)
    assert not {"linear_skip", "detail_prediction"} & found.stage2.model_dump(exclude_defaults=True).keys()
    assert not Lora().train_norms
