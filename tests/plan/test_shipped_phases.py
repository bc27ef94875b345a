"""Every phase of the shipped upgrade recipes fits the hardware that the recipe states."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from davae.plan.dry_run import plan
from davae.plan.phase_sizes import DEFAULT_GPU
from davae.recipes import load_recipe
from davae.recipes.sections import Hardware
from davae.recipes.stages import POLISH
from davae.recipes.upgrade import Recipe

ROOT = Path(__file__).parents[2]
NAMES = ["stage1", "cache", POLISH, "stage2", "export", "report", "sampling"]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks/phases.py"))
SHIPPED: list[str] = BENCHMARK["upgrade_recipes"]()


IN_RESULTS = (
    "imagenet512-lightningdit-xl"  # its `hardware` is part of the keys of `davae reproduce`: no limits are added
)


def recorded() -> dict[str, Any]:
    return json.loads((ROOT / "docs/results/phases.json").read_text(encoding="utf-8"))


def test_every_shipped_recipe_is_recorded():
    assert set(recorded()) == set(SHIPPED), "run benchmarks/phases.py"


@pytest.mark.parametrize("name", sorted(recorded()))
def test_every_recorded_phase_fits_the_hardware_of_its_recipe(name: str):
    found, recipe = recorded()[name], load_recipe(name)
    assert isinstance(recipe, Recipe)
    hardware = recipe.hardware or Hardware(gpu=DEFAULT_GPU)
    assert (found["gpu"], found["gpus"]) == (hardware.gpu, hardware.count), "run benchmarks/phases.py"
    names = [name for name in NAMES if name != POLISH or recipe.stage1.polish is not None]
    assert [phase["name"] for phase in found["phases"]] == names
    for phase in found["phases"]:
        assert phase["fits"], phase
        assert phase["device_gib"] < found["gpu_gib"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_of_a_recipe_states_what_it_takes(name: str):
    """GPU, main memory and disk, as planned; the limits that a dry run checks are those of whole machines."""
    comments = (ROOT / f"src/davae/recipes/{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    found, recipe = recorded()[name], load_recipe(name)
    assert BENCHMARK["header"](found) in comments.splitlines(), "run benchmarks/phases.py"
    assert isinstance(recipe, Recipe)
    if recipe.hardware is not None and name != IN_RESULTS:
        assert recipe.hardware.host_gib is not None
        assert recipe.hardware.disk_gib is not None
        assert max(phase["machine_gib"] for phase in found["phases"]) < recipe.hardware.host_gib
        assert sum(phase["disk_gib"] for phase in found["phases"]) < recipe.hardware.disk_gib <= 1024


def test_a_header_is_written_in_place_of_an_earlier_one(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("# A model.\n# More.\nname: x\n")
    for line in ("# Planned for 1 GPU", "# Planned for 2 GPUs"):
        BENCHMARK["write_header"](path, line)
        assert path.read_text() == f"# A model.\n# More.\n{line}\nname: x\n"


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
