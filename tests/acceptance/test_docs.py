"""The documentation: commands that parse, links that lead somewhere, a site that builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from davae.cli import app
from davae.recipes import load_recipe, shipped_recipes, validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if path.is_file())
COMMAND: Any = typer.main.get_command(app)
PLACEHOLDERS = re.compile(r"\bVERB\b|\bTABLE\b|\bNAME\b|[\[\]|]|\.\.\.")


def commands_of(page: Path) -> list[tuple[list[str], bool]]:
    """`davae` command lines of a page, and whether they are whole: those of shell blocks are; a sentence or a table may
    name only the options it talks of."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [(line, True) for block in blocks for line in block.splitlines()]
    lines += [(" ".join(code.split()), False) for code in re.findall(r"`([^`]+)`", outside)]
    found = [(shlex.split(line, comments=True)[1:], whole) for line, whole in lines if line.startswith("davae ")]
    return [(words, whole) for words, whole in found if not PLACEHOLDERS.search(" ".join(words))]


COMMANDS = [(page, *command) for page in PAGES for command in commands_of(page)]


def parse(words: list[str]) -> None:
    """Resolve verbs and parse options as the command line does, and run nothing. A verb alone is only looked up."""
    command: click.Command = COMMAND
    context = click.Context(command, info_name="davae")
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        if not words:
            return
        _, command, words = command.resolve_command(context, words)  # type: ignore[attr-defined]
        context = click.Context(command, parent=context, info_name=command.name)
    if words and words != ["--help"]:
        command.make_context(command.name, list(words), parent=context.parent)


def test_every_command_of_the_documentation_parses():
    assert len(COMMANDS) > 40
    wrong = []
    for page, words, whole in COMMANDS:
        try:
            parse(words)
        except Exception as error:  # noqa: BLE001 - typer's own click raises classes of its own
            if whole or "Missing" not in str(error):
                wrong.append(f"{page.name}: davae {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_would_be_found():
    for words in (
        ["upgrad", "micro"],
        ["analyze", "spectra", "--num", "8"],
        ["inspect", "micro", "--resolution", "big"],
    ):
        with pytest.raises(Exception, match=r".+"):
            parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_files_that_the_paper_map_names_exist():
    text = (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:latent|models|losses|train|evaluate|analyze|recipes)[\w./*]*\.(?:py|yaml))`", text):
        assert list((ROOT / "src" / "davae").glob(path)), path
    for name in re.findall(r"`(?:[\w/]+\.py)`, `(\w+)`", text):
        assert re.search(rf"def {name}\b", "".join(p.read_text() for p in (ROOT / "src/davae").rglob("*.py"))), name


def test_yaml_of_the_documentation_is_a_recipe():
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if "stage1" in block
    ]
    assert blocks
    for block in blocks:
        validate(yaml.safe_load(block), "documentation")


def test_the_recipes_page_names_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"`{name}`" in text
        assert load_recipe(name).name


def test_every_page_is_in_the_navigation_and_the_site_builds(tmp_path: Path):
    for needed in ("material", "mkdocstrings"):
        pytest.importorskip(needed, reason="the site needs davae[docs]")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exist in the docs directory, but are not included" not in done.stderr
    assert "alignment_loss" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
