"""Every phase of the shipped upgrade recipes fits the hardware that the recipe states."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from davae.recipes import load_recipe
from davae.recipes.schema import Recipe
from davae.recipes.sections import Hardware
from davae.train.phase_sizes import DEFAULT_GPU
from davae.train.plan import plan

ROOT = Path(__file__).parents[1]
NAMES = ["stage1", "cache", "stage2", "export", "report", "sampling"]
SHIPPED: list[str] = runpy.run_path(str(ROOT / "benchmarks/phases.py"))["upgrade_recipes"]()


def recorded() -> dict[str, Any]:
    return json.loads((ROOT / "docs/results/phases.json").read_text(encoding="utf-8"))


def test_the_recorded_phases_are_those_of_shipped_recipes():
    assert set(recorded()) <= set(SHIPPED)
    assert len(recorded()) >= 6


@pytest.mark.parametrize("name", sorted(recorded()))
def test_every_recorded_phase_fits_the_hardware_of_its_recipe(name: str):
    found, recipe = recorded()[name], load_recipe(name)
    assert isinstance(recipe, Recipe)
    hardware = recipe.hardware or Hardware(gpu=DEFAULT_GPU)
    assert (found["gpu"], found["gpus"]) == (hardware.gpu, hardware.count), "run benchmarks/phases.py"
    assert [phase["name"] for phase in found["phases"]] == NAMES
    for phase in found["phases"]:
        assert phase["fits"], phase
        assert phase["device_gib"] < found["gpu_gib"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_phase_fits_as_planned_now(name: str):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    found = plan(recipe).as_dict()
    assert all(phase["fits"] for phase in found["phases"])
    before = {phase["name"]: phase["device_gib"] for phase in recorded().get(name, found)["phases"]}
    for phase in found["phases"]:
        assert phase["device_gib"] == pytest.approx(before[phase["name"]], rel=0.05, abs=0.1)
