"""The documentation: commands that parse, links that lead somewhere, a site that builds."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

import davae
from davae.cli import app
from davae.recipes import load_recipe, shipped_recipes, validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND: Any = typer.main.get_command(app)
PLACEHOLDERS = re.compile(r"\bVERB\b|\bTABLE\b|\bNAME\b|[\[\]|]|\.\.\.")


def commands_of(page: Path) -> list[tuple[list[str], bool]]:
    """`davae` command lines of a page, and whether they are whole: those of shell blocks are; a sentence or a table may
    name only the options it talks of."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [(line, True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [(" ".join(code.split()), False) for code in re.findall(r"`([^`]+)`", outside)]
    lines = [(line.split(" > ")[0], whole) for line, whole in lines]
    found = [(shlex.split(line, comments=True)[1:], whole) for line, whole in lines if line.startswith("davae ")]
    return [(words, whole) for words, whole in found if not PLACEHOLDERS.search(" ".join(words))]


COMMANDS = [(page, *command) for page in PAGES for command in commands_of(page)]


def parse(words: list[str]) -> None:
    """Resolve verbs and parse options as the command line does, and run nothing. A verb alone is only looked up."""
    command: click.Command = COMMAND
    if words in (["--help"], ["--version"], ["-h"]):
        return
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_launches_start_davae_as_a_module(page: Path):
    """`accelerate launch` takes a script's path, or `-m` and a module, and not the name of a command."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ")
    named = re.findall(r"`accelerate launch([^`\n]*)`\s+(?:before|in front of)", lines)
    typed = re.findall(r"accelerate launch([^`\n]*?)(?:\bdavae [a-z]|\$RUN)", lines)
    assert all(re.search(r" -m *$", options) for options in named)
    assert all(re.search(r" -m *$", options) or "CONFIGS" in options for options in typed)
    assert page.name != "cluster.md" or 'RUN="-m davae ' in lines


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
    found = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    targets = [(link or image).split("#")[0] for link, image in found]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


GENERATED = ("paper-scale.md", "families-table.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_prose_fits_its_lines_and_uses_the_field_s_word(page: Path):
    """Outside of code, tables and images: at most 120 columns, and *image*, not *picture*."""
    made = r"```.*?```|<!-- attempts -->.*?<!-- end of attempts -->"
    text = re.sub(made, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "![", "<img ", ":::", "    "))]
    assert not [line for line in prose if len(line) > 120]
    assert not re.findall(r".*\bpictures?\b.*", re.sub(r"`[^`]*`", "", text), flags=re.IGNORECASE)


CODE_PAGES = [ROOT / "docs" / "paper-map.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "add-family.md",
              ROOT / "CONTRIBUTING.md"]  # fmt: skip


def paths_of(page: Path) -> set[str]:
    """Files and folders of the repository that a page names: in code spans, and at the start of the lines of a map."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    starts = [line.split()[0] for block in blocks for line in block.splitlines() if line.strip()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {path for path in [*starts, *spans] if re.fullmatch(r"[\w./*-]+(\.(py|yaml|md|toml)|/)", path)}


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path):
    paths = paths_of(page)
    assert len(paths) >= 3
    missing = [path for path in paths if not any(list(root.glob(path)) for root in (ROOT, ROOT / "src" / "davae"))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_our_files_in_code_spans_exist(page: Path):
    """Paths below a folder of the repository or of the package; figures and results below docs/."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    roots = (ROOT, ROOT / "src" / "davae")
    paths = re.findall(r"`([\w./*-]+/[\w.*-]+\.(?:py|yaml|md|sbatch|cpp)|docs/[\w./*-]+)`", text)
    ours = [path for path in paths if any((root / path.split("/")[0]).is_dir() for root in roots)]
    assert not [path for path in ours if not path.startswith("runs/") and not any(list(r.glob(path)) for r in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_are_those_of_the_code(page: Path):
    """A module, or a module and a name in its text."""
    for name in set(re.findall(r"\bdavae(?:\.[a-z_]+)+\.\w+", page.read_text(encoding="utf-8"))):
        path, parts = ROOT / "src", name.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        file = path / f"{parts[0]}.py" if parts else path / "__init__.py"
        module = file if file.is_file() else path / "__init__.py"
        rest = parts[1:] if file.is_file() else parts
        assert all(re.search(rf"\b{word}\b", module.read_text(encoding="utf-8")) for word in rest[:1]), name


def test_names_of_the_paper_map_are_in_their_files():
    found = []
    for line in (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8").splitlines():
        for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", line):
            text = (ROOT / "src" / "davae" / path).read_text(encoding="utf-8")
            for name in re.findall(r"\w+", names):
                found.append(name)
                assert re.search(rf"^ *(?:def|class) {name}\b", text, flags=re.MULTILINE), f"{path}: {name}"
    assert len(found) > 10


def test_the_map_of_the_code_is_whole():
    """Every package and loose module is in the map, and packages stand in its layers in the order of the contract."""
    page = ROOT / "docs" / "architecture.md"
    ours = [path for path in (ROOT / "src" / "davae").iterdir() if path.name[0] != "_"]
    packages = {path.name for path in ours if (path / "__init__.py").is_file()}
    assert {f"{name}/" for name in packages} <= paths_of(page)
    picture = page.read_text(encoding="utf-8").split("## The layers")[1].split("```text\n")[1].split("```")[0]
    drawn = [[word for word in line.split() if word in packages] for line in picture.splitlines()]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    order = [name for layer in contract["layers"] for name in re.findall(r"davae\.(\w+)", layer) if name in packages]
    assert sorted(name for words in drawn for name in words) == sorted(packages)
    rows = {name: row for row, words in enumerate(drawn) for name in words}
    assert [rows[name] for name in order] == sorted(rows.values())


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Yield the text of every string of a file; values that are formatted in are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_troubleshooting_page_are_davae_s_own():
    """The first column of the tables under `davae prints`."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| davae prints .*?\n\|[-|]+\n((?:\|.*\n)+)", page)
    messages = [row.split("|")[1].strip(" `") for table in tables for row in table.splitlines()]
    assert len(messages) > 20
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    texts = "\n".join(text for tree in trees for text in texts_of(tree))
    assert not [message for message in messages if message not in texts]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT], ids=lambda page: page.name)
def test_code_of_the_front_pages_fits_a_column_of_github(page: Path):
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 95]


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


def test_shipped_recipes_use_the_words_of_the_pages():
    """*image*, not *picture*, in comments and values; keys that have it are promises. All large recipes have one fate."""
    for name, text in shipped_recipes().items():
        assert not re.findall(r".*\b(?:pictures?|says?|said|told)\b.*", text, flags=re.IGNORECASE), name
        assert ("Needs GPUs." in text) == ("This recipe was never run to its end." in text), name


def test_the_recipes_page_names_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"`{name}`" in text
        assert load_recipe(name).name


def test_the_table_of_gpus_has_the_planned_figures():
    planned = json.loads((ROOT / "docs" / "results" / "phases.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\d) x (\w+), (\d+) GB \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 8
    for name, gpus, gpu, memory, cells in rows:
        plan, (*figures, hours, disk) = planned[name], cells.split(" | ")
        assert (int(gpus), f"{gpu.lower()}-{memory}gb") == (plan["gpus"], plan["gpu"])
        phases = {phase["name"]: phase for phase in plan["phases"]}
        expected = [
            f"{phases[phase]['device_gib']:.1f}" for phase in ("stage1", "cache", "stage2", "report", "sampling")
        ]
        assert figures == expected, name
        total = sum(phase["hours"] for phase in plan["phases"] if phase["name"] != "sampling")
        assert hours == (f"{total:.0f}" if total >= 1 else "under 1"), name
        taken = sum(phase["disk_gib"] for phase in plan["phases"])
        assert disk == f"{taken:.{0 if taken >= 10 else 1}f}", name


def test_every_public_name_is_on_the_python_page():
    """But for classes that exported folders name, and nobody imports."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {name for name in davae.__all__ if not re.fullmatch(r"Detail\w+Pipeline|PooledAutoencoderTiny", name)}
    assert named <= set(re.findall(r"^::: davae\.(\w+)$", text, flags=re.MULTILINE))


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
