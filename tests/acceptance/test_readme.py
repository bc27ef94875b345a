"""What the README tells people to type works."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_convert import tiny_vavae
from test_lightning_dit import random_model
from test_training import finished, recipe_file, recipe_values, run_cli
from warm import run

__all__ = ["finished", "recipe_file", "recipe_values"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    whole = (block.replace("\\\n", " ") for block in blocks("sh"))
    lines = [line for block in whole for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


UPGRADE = '"sd35-medium-1k", base="path/to/sd3.5-medium", data="path/to/images", out="runs/sd35"'


def test_python_examples_run(recipe_file: Path, finished: Path, tmp_path: Path):
    """Each in a process of its own."""
    assert sum(UPGRADE in block for block in blocks("python")) == 1
    for block in blocks("python"):
        code = block.replace("runs/demo/pipeline", str(finished / "pipeline")).replace("steps=30", "steps=2")
        code = code.replace("height=1024, width=1024, ", "")  # the tiny model's own size
        code = code.replace(UPGRADE, f'"{recipe_file}", out="{finished}"')
        run(["-c", code], tmp_path / "log", cwd=tmp_path)
    assert (tmp_path / "rose.png").is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


OFFICIAL = "path/to/vavae.pt", "path/to/lightningdit-xl.pt", "models/lightningdit-xl", "imagenet512-lightningdit-xl"
COMMANDS = [c for c in commands() if c[0] == "davae"]


@pytest.mark.parametrize("words", [c for c in COMMANDS if not set(OFFICIAL) & set(c)], ids=" ".join)
def test_commands_run_on_a_tiny_model(
    words: list[str], finished: Path, tiny_base: Path, picture_folder: Path, tmp_path, capsys
):
    """Every command as written, with the tiny model, pictures and sizes in the place of the big ones."""
    swaps = {
        "path/to/sd3.5-medium": str(tiny_base),
        "path/to/images": str(picture_folder),
        "runs/sd35": str(finished),
    }
    swapped = words[1:]
    for old, new in swaps.items():
        swapped = [word.replace(old, new) for word in swapped]
    if words[1] == "upgrade":
        swapped += ["--set", "base.resolution=16", "--dry-run"]
    elif words[1] == "inspect":  # the preset itself is inspected in test_inspect.py
        swapped = [str(tiny_base) if word == "sd35-medium" else word for word in swapped]
    elif words[1] == "sample":
        swapped += ["--steps", "1", "--out", str(tmp_path)]
    swapped = ["32" if word == "1024" else word for word in swapped]
    run_cli(*swapped)
    assert capsys.readouterr().out.strip()


def test_official_weights_from_files_to_an_upgrade(shared: Path, classes: Path, tmp_path: Path, monkeypatch):
    """The class-conditional commands as written, in order, on official files of tiny models."""
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    ddconfig, state = tiny_vavae(shared)
    torch.save({"state_dict": state}, "path/to/vavae.pt")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, "path/to/latents_stats.pt")
    Path("vavae.yaml").write_text(yaml.safe_dump({"ddconfig": ddconfig}))
    torch.save({"ema": random_model(torch.float32, num_classes=2).state_dict()}, "path/to/lightningdit-xl.pt")
    extra = {
        "vavae": ["--config", "vavae.yaml"],
        "imagenet512-lightningdit-xl": ["--dry-run", "--set", "base.resolution=32", "--set", "detail_channels=8"],
        "samples": ["--num", "4", "--steps", "2"],
        "sample": ["--steps", "1"],
    }
    official = [words for words in COMMANDS if set(OFFICIAL) & set(words)]
    assert len(official) == 5
    for words in official:
        more = next((extra[word] for word in reversed(words[1:4]) if word in extra), [])
        run_cli(*[word.replace("path/to/imagenet", str(classes)) for word in words[1:]], *more)
    assert Path("samples.npz").is_file()


def test_every_verb_has_help(capsys: pytest.CaptureFixture):
    for verb in ("upgrade", "train-vae", "cache-latents", "train-dit", "train-base", "sample", "inspect", "recipes"):
        run_cli(verb, "--help")
        assert "Usage" in capsys.readouterr().out
    assert sys.argv
