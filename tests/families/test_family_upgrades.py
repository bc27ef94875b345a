"""One line a family: from a tiny pipeline of the real classes, through `davae upgrade`, to the unmodified stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS, VARIANTS
from conftest import picture, tiny_upgrade_recipe

import davae
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import supported
from davae.errors import RecipeError
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import default_resolution, read_shapes
from davae.recipes import validate
from davae.runs.checks import check_recipe
from davae.runs.upgrade import Upgrade
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.tasks.base_model import BaseModel


def test_every_family_that_trains_has_a_builder():
    trains = {row.class_name for row in supported() if row.trains}
    # these two have test files of their own
    assert {name.split(" ")[0] for name in BUILDERS} == trains - {"SD3Transformer2DModel", "LightningDiT"}


def write_classes(folder: Path, width: int, height: int) -> Path:
    """Twelve captioned pictures in two sub-folders, which are classes."""
    for number in range(12):
        name = ["red", "blue"][number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture(number, width, height).save(folder / name / f"{number:02d}.png")
        (folder / name / f"{number:02d}.txt").write_text(f"a {name} square")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 72x68 pixels."""
    return write_classes(tmp_path_factory.mktemp("classes"), 72, 68)


def family_recipe(name: str, folder: Path, classes: Path) -> dict[str, Any]:
    """Builds a tiny base in `folder/base`; recipe values that upgrade it in seconds."""
    torch.manual_seed(0)
    {**BUILDERS, **VARIANTS}[name](folder / "base")
    shapes = read_shapes(str(folder / "base"))
    size = max(8, 2 * shapes.vae_factor * shapes.patch_size)  # several stock pipelines want multiples of 8
    pictures = classes if 2 * size <= 64 else write_classes(folder / "pictures", 2 * size, 2 * size)
    changes: dict[str, Any] = {"base__resolution": size, "detail_channels": 2 * shapes.channels}
    return tiny_upgrade_recipe(folder / "base", pictures, **changes, stage2__max_steps=2)


@pytest.mark.parametrize("name", {**BUILDERS, **VARIANTS})
def test_upgrade_gives_a_stock_pipeline_at_the_doubled_size(name: str, classes: Path, tmp_path: Path):
    recipe = validate(family_recipe(name, tmp_path, classes), name)
    base, size = load_pipeline(str(tmp_path / "base")), recipe.base.resolution
    pipeline = Upgrade(recipe, tmp_path / "run", lambda progress: None).run()  # type: ignore[arg-type]
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss_detail" in record for record in losses if record["stage"] == "stage2")

    kind = json.loads((pipeline / "model_index.json").read_text())["_class_name"]
    upgraded = model_class(kind).from_pretrained(pipeline)
    upgraded.set_progress_bar_config(disable=True)
    assert isinstance(upgraded.vae, davae.DetailVAE)
    # the same tokens draw a picture twice as wide; for no size, davae draws the training's, a stock pipeline its own
    assert default_resolution(upgraded) == recipe.resolution == 2 * size
    upgraded.vae.register_to_config(resolution=None)
    assert default_resolution(upgraded) == 2 * default_resolution(base)
    assert generate(base, ["a red square"], SamplingOptions(resolution=size, steps=2))[0].size == (size, size)
    assert generate(upgraded, ["a red square"], SamplingOptions(resolution=2 * size, steps=2))[0].size == (
        2 * size,
        2 * size,
    )


def test_sizes_that_a_model_s_groups_do_not_divide_are_told_at_once(picture_folder: Path, tmp_path: Path):
    BUILDERS["QwenImage21Transformer2DModel"](tmp_path)  # 16 pixels a position, four positions a slot
    recipe = validate(tiny_upgrade_recipe(tmp_path, picture_folder, base__resolution=48), "odd")
    with pytest.raises(RecipeError, match=r"base.resolution: 48 is not divisible by 32 .*; use 32 or 64"):
        check_recipe(recipe, BaseModel(str(tmp_path)))  # type: ignore[arg-type]
