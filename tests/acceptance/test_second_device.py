"""Everything runs on a device that is not the CPU, and a training's losses are the same there.

No GPU is needed: `second_device` is a device of its own for torch, whose memory and arithmetic are the CPU's, and whose
tensors do not mix with the CPU's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from cases import BUILDERS, VARIANTS
from conftest import picture, tiny_upgrade_recipe
from test_class_conditional import FLOW, base_recipe
from test_family_upgrades import family_recipe, write_classes
from test_training import run_cli
from warm import run

from davae.train.run_folder import read_metrics

DEVICE = Path(__file__).parents[1] / "second_device"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling the device takes g++")


def run_there(build: Path, folder: Path, commands: list[list[object]]) -> str:
    """Run davae commands one after the other in a process of their own; what they print."""
    file = folder / "commands.json"
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    return run([str(DEVICE / "__main__.py"), str(build), str(file)], folder / "log")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the device is compiled, once for all workers: torch locks the folder."""
    folder = tmp_path_factory.getbasetemp().parent / "second-device-build"
    folder.mkdir(exist_ok=True)
    return folder


def losses(run: Path) -> dict[str, float]:
    records = read_metrics(run / "metrics.jsonl")
    return {f"{r['stage']}, step {r['step']}": r["loss"] for r in records if "loss" in r}


def same(values: dict[str, float]) -> object:
    """Equal, but for what Adam makes of rounding."""
    return pytest.approx(values, rel=1e-3)


def test_an_upgrade_from_training_to_benchmarks(build: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, picture_folder)))
    there, data = tmp_path / "there", picture_folder
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue ball\n")
    picture(0, 16, 16).save(small := tmp_path / "small.png")
    retention = ["analyze", "retention", tiny_base, there, "--data", data, "--num", 8, "--drawn", 1, "--steps", 1]
    run_there(
        build,
        tmp_path,
        [
            ["upgrade", recipe, "--out", there],
            ["sample", there, "a red square", "--num", 2, "--steps", 2, "--offload", "model"],
            ["evaluate", "generation", "--pipeline", there, "--data", data, "--num", 4, "--steps", 2],
            ["evaluate", "reconstruction", "--vae", there, "--data", data, "--features", "lite0"],
            ["evaluate", "prompts", "--pipeline", there, "--prompts", prompts, "--steps", 2, "--out", tmp_path / "p"],
            ["make-data", "--model", tiny_base, "--prompts", prompts, "--steps", 1, "--out", tmp_path / "data"],
            *([*retention, "--offload", way, "--out", tmp_path / way] for way in ("model", "sequential")),
            *(
                ["upscale", there, small, "--steps", 1, "--offload", way, "--out", tmp_path / f"{way}-large"]
                for way in ("model", "sequential")
            ),
            ["analyze", "spectra", "--vae", there, "--data", data, "--num", 8, "--out", tmp_path / "a"],
            ["bench", "vae", there / "vae", "--resolution", 64, "--tile", 32, "--only", "decode", "--repeats", 1],
            ["bench", "tokens", tiny_base, "--resolution", 32, "--blocks", 1, "--repeats", 1],
            ["bench", "whole", tiny_base, "--resolution", 32, "--blocks", 1, "--repeats", 1],
            ["bench", "sample", tiny_base, there, "--steps", 2, "--repeats", 1],
            ["bench", "guidance", "--hidden-size", 64, "--depth", 1, "--grid", 4, "--num-steps", 4, "--repeats", 1],
        ],
    )
    run_cli("train-dit", str(recipe), "--out", str(tmp_path / "here"))
    assert losses(there) == same(losses(tmp_path / "here"))


@pytest.mark.slow
def test_every_family_trains_and_draws(build: Path, tmp_path: Path):
    classes = write_classes(tmp_path / "classes", 72, 68)
    commands: list[list[object]] = []
    for number, name in enumerate({**BUILDERS, **VARIANTS}):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = family_recipe(name, folder, classes)
        size = values["base"]["resolution"]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        commands.append(["train-dit", folder / "recipe.yaml", "--out", folder / "run"])
        for model, pixels in ((folder / "base", size), (folder / "run", 2 * size)):
            drawn = ["sample", model, "a red square", "--num", 1, "--steps", 2, "--out", tmp_path / "samples"]
            commands.append([*drawn, "--resolution", pixels])
    run_there(build, tmp_path, commands)


@pytest.mark.slow
def test_both_stages_are_measured(build: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, picture_folder)))
    stages = ("stage1", "stage2")
    run_there(build, tmp_path, [["bench", stage, recipe, "--steps", 1, "--repeats", 1] for stage in stages])


@pytest.mark.slow
def test_classes_baselines_and_enlarging(build: Path, classes: Path, tmp_path: Path):
    align = {"base_resolution": 16, "embedder": {"max_steps": 2, "batch_size": 2}, "head": {**FLOW, "max_steps": 2}}
    files = {
        "base": base_recipe(data={"source": str(classes)}),
        "network": {
            "kind": "super-resolution",
            "name": "tiny-sr",
            "resolution": 32,
            "data": {"source": str(classes)},
            "network": {"channels": 8, "layers": 1, "max_steps": 2, "batch_size": 2, "perceptual": "lite0"},
        },
        "dcgen": {
            **base_recipe(data={"source": str(classes)}),
            "init": str(tmp_path / "base" / "pipeline"),
            "align": align,
        },
    }
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    base = tmp_path / "base"
    generation = ["evaluate", "generation", "--pipeline", base, "--data", classes, "--num", 4, "--steps", 2]
    printed = run_there(
        build,
        tmp_path,
        [
            ["train-base", tmp_path / "base.yaml", "--out", base],
            *(["sample", base, "1", "--num", 1, "--steps", 2, "--offload", way] for way in ("model", "sequential")),
            ["evaluate", "samples", "--pipeline", base, "--num", 4, "--steps", 2, "--out", tmp_path / "samples.npz"],
            ["train-sr", tmp_path / "network.yaml", "--out", tmp_path / "sr"],
            [*generation, "--compare-at", 32, "--upscale", tmp_path / "sr" / "network.safetensors"],
            ["train-base", tmp_path / "dcgen.yaml", "--out", tmp_path / "dcgen"],
        ],
    )
    assert "fd_lite0" in printed
    run_cli("train-base", str(tmp_path / "base.yaml"), "--out", str(tmp_path / "here"))
    assert losses(base) == same(losses(tmp_path / "here"))
