"""BaseModel: every config of a base model is read once, and few functions see the recipe before training begins."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import tiny_recipe, tiny_upgrade_recipe

import davae
from davae.errors import ModelError
from davae.pretrained import open as opening
from davae.pretrained.shapes import read_shapes
from davae.pretrained.text_encoders import text_encoders
from davae.recipes import Recipe, load_recipe
from davae.recipes.loading import validate
from davae.recipes.sections import Stage2
from davae.runs.upgrade import Upgrade
from davae.tasks.base_model import BaseModel
from davae.zoo import resolve

FUNCTIONS = 25  # that may be handed the recipe or its base model before anything is trained
STAGE2 = Stage2(max_steps=1, batch_size=1)
PACKAGE = str(Path(davae.__file__).parent)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts of the config files that are read."""
    found: Counter[tuple[str, str]] = Counter()
    read = opening.read_config

    def counted(model: str, part: str, filename: str = "config.json") -> dict[str, Any]:
        found[part, filename] += 1
        return read(model, part, filename)

    monkeypatch.setattr(opening, "read_config", counted)
    return found


def test_a_base_model_is_what_its_folder_says():
    base = BaseModel.of(load_recipe("micro"))  # type: ignore[arg-type]
    assert base.name == resolve("micro")
    assert base.title == "micro"
    assert base.shapes == read_shapes(resolve("micro"))
    assert base.pipeline_class == "StableDiffusion3Pipeline"
    assert base.family.pipeline == base.pipeline_class
    assert base.objective(STAGE2).prediction == "flow"
    assert base.distilled is None
    assert type(base.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert base.silent_t5
    assert base.text_encoders == text_encoders(resolve("micro"), base.shapes.transformer_config)
    assert base.bucket_step(2) == 2 * base.shapes.vae_factor * base.shapes.patch_size
    assert BaseModel("micro").title == "micro"


def test_configs_are_read_once(reads: Counter[tuple[str, str]]):
    base = BaseModel(resolve("micro"))
    for _ in range(2):
        for name in ("shapes", "distilled", "text_encoders", "silent_t5", "scheduler"):
            getattr(base, name)
        base.objective(STAGE2)
    assert set(reads.values()) == {1}
    assert ("", "model_index.json") in reads
    assert ("scheduler", "scheduler_config.json") in reads


def test_parts_are_loaded_as_the_folder_has_them():
    base = BaseModel(resolve("micro"))
    transformer, vae = base.load_transformer(torch.bfloat16), base.load_vae()
    assert (type(transformer).__name__, transformer.dtype) == (base.shapes.transformer_class, torch.bfloat16)
    assert (type(vae).__name__, vae.dtype) == (base.shapes.vae_class, torch.float32)
    encoders = base.load_text_encoders(torch.float32)
    assert encoders.transformer.config["sample_size"] == base.shapes.transformer_config["sample_size"]
    assert not isinstance(encoders.transformer, torch.nn.Module)
    assert type(base.load_pipeline(torch.float32)).__name__ == base.pipeline_class


def test_a_base_model_that_a_recipe_trains_is_planned_without_a_file(tmp_path: Path):
    values = {
        **tiny_upgrade_recipe(tmp_path, tmp_path),
        "base": {"train": tiny_recipe().model_dump(), "resolution": 16},
    }
    recipe = validate(values, "x")
    assert isinstance(recipe, Recipe)
    base = BaseModel.of(recipe, tmp_path)
    assert base.name == str(tmp_path / "base" / "pipeline")
    assert base.shapes.transformer_class == "SD3Transformer2DModel"
    assert base.objective(STAGE2).prediction == "flow"
    assert base.distilled is None
    assert base.text_encoders == []
    with pytest.raises(ModelError):
        base.load_vae()


def test_a_transformer_that_contradicts_its_scheduler_is_refused(tiny_base: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "epsilon"}))
    with pytest.raises(ModelError, match="its transformer predicts epsilon, its scheduler belongs to flow"):
        BaseModel(str(folder)).objective(STAGE2)


def test_few_functions_see_the_recipe_before_training_begins(
    tiny_base: Path, picture_folder: Path, tmp_path: Path, reads: Counter[tuple[str, str]]
):
    """Functions of davae that are handed the recipe, its base model or that model's configs while an Upgrade is made."""
    recipe: Any = validate(tiny_upgrade_recipe(tiny_base, picture_folder), "tiny")
    seen: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names if name != "self"]
        if any(isinstance(value, (Recipe, BaseModel, opening.Configs)) for value in given):
            seen[f"{Path(code.co_filename).stem}.{code.co_qualname}"] += 1

    sys.setprofile(watch)
    try:
        Upgrade(recipe, tmp_path / "run", lambda progress: None)
    finally:
        sys.setprofile(None)
    assert "upgrade_parts.UpgradeParts.__init__" in seen
    assert len(seen) < FUNCTIONS, seen
    assert set(reads.values()) == {1}, "each config is read once"
