"""Rules of the house: sizes, names, imports and words, checked on the text of the library without running it.

`davae.__all__`, verbs and recipe fields are promises; the rest of the library may be rearranged as long as these rules hold.
Numbers are ceilings that may only fall, lists of exceptions may only get shorter. The redesign planned 22,000 lines for the
whole library; it has grown to about 43,000 lines of features since. Each package therefore has the size it had when this
test was written, rounded up to the next 50, as its ceiling. The method itself (`CORE`) keeps the ceiling of the plan.

A new capability may raise its package's ceiling in the commit that adds it, and code that moves takes its lines along;
nothing else may.

Docstrings of verbs are help texts, which stay as they are: they are not counted.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import davae
from davae.homes import HOMES

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
FILE_LINES, FUNCTION_LINES, FIRST_LINE = 400, 60, 90


@dataclass(frozen=True)
class Ceiling:
    """Most lines of a package, banned words in its prose, and first lines of docstrings that break the rules."""

    lines: int
    words: int = 0
    openings: int = 0


CEILINGS = {
    "analyze": Ceiling(1500),
    "app": Ceiling(3900),
    "backbones": Ceiling(4055),
    "benchmarks": Ceiling(2400),
    "commands": Ceiling(2685),
    "convert": Ceiling(720),
    "cost": Ceiling(717),
    "data": Ceiling(7720),
    "dataset": Ceiling(950),
    "evaluate": Ceiling(2550),
    "files": Ceiling(1200),
    "lab": Ceiling(3850),
    "losses": Ceiling(900),
    "plan": Ceiling(1863),
    "pretrained": Ceiling(1835),
    "publish": Ceiling(1645),
    "recipes": Ceiling(1592),
    "root": Ceiling(772),
    "runs": Ceiling(3050),
    "sample": Ceiling(3235),
    "scripts": Ceiling(150),
    "tasks": Ceiling(2034),
    "train": Ceiling(2130),
    "vae": Ceiling(2247),
    "zoo": Ceiling(135),
}
PAGE_WORDS = 0  # in README, CHANGELOG and the pages of docs/
CORE_LINES_NOW = 3_150  # falls to CORE_LINES
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
TWINS = """
"""  # names that several modules define

CORE_LINES = 2_600  # the plan's
CORE = (
    "latent.py",
    "losses/*.py",
    *(f"vae/{stem}.py" for stem in ("detail_vae", "blocks", "warm_start", "posterior")),
    "backbones/expand.py",
    *(f"tasks/{stem}.py" for stem in ("stage1", "stage2", "reconstruction", "noising", "conditioning")),
    "train/loop.py",
)

PUBLIC = """
ClassConditionalPipeline DetailAuraFlowPipeline DetailErnieImagePipeline DetailHunyuanDiTPipeline DetailKrea2Pipeline
DetailLongCatImagePipeline DetailLumina2Pipeline DetailLuminaPipeline DetailPixArtAlphaPipeline
DetailPixArtSigmaPipeline DetailQwenImage21Pipeline DetailVAE DetailZImagePipeline LatentLayout LightningDiT
PooledAutoencoderTiny Progress UpgradeRun alignment_loss detail_weight expand_transformer group_mean load preview
upgrade upscale velocity_loss widen_lora
"""

BANNED = re.compile(
    r"\b(told|tells|says|speaks|hangs? on|beside|so many|is no(?! longer)|stands (?:for|in)|goes by|in turns|wants|asks)"
    r"\b",
    re.IGNORECASE,
)
OPENINGS = re.compile(r"(What|Which|How|Where|Whether|Those|The same|As|Of)\b")
CODE = re.compile(r"```.*?```|``[^`]+``|`[^`]*`", re.DOTALL)

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# -- the text of the library -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One file of Python."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Return the folder of `src/davae` (`root` for files above), or `benchmarks` or `scripts`."""
        parts = self.path.relative_to(ROOT).parts
        if parts[0] != "src":
            return parts[0]
        return parts[2] if len(parts) > 3 else "root"

    @property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[1 if parts[0] == "src" else 0 : -1 if parts[-1] == "__init__" else None])

    @property
    def place(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def definitions(self) -> list[tuple[str, Definition]]:
        """Return (dotted name, node) of the module and every class, function and method, inner ones too."""
        found: list[tuple[str, Definition]] = [(self.module, self.tree)]

        def visit(node: ast.AST, prefix: str) -> None:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                for child in getattr(node, field, ()):
                    if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                        name = f"{prefix}.{child.name}"
                        found.append((name, child))
                        visit(child, name)
                    elif not isinstance(child, ast.expr):
                        visit(child, prefix)

        visit(self.tree, self.module)
        return found

    @cached_property
    def docstrings(self) -> list[tuple[int, str]]:
        """Return (line, docstring) of all but the functions of verbs."""
        verbs = "commands" in self.path.parts
        found = []
        for name, node in self.definitions:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            text = ast.get_docstring(node)
            if text is not None and not (verbs and function and not name.rpartition(".")[2].startswith("_")):
                found.append((getattr(node, "lineno", 1), text))
        return found

    def comments(self) -> Iterator[tuple[int, str]]:
        """Yield (line, comment); files without a suspect line are not tokenized, which takes long."""
        if any("#" in line and BANNED.search(line) for line in self.text.splitlines()):
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.string

    def banned(self) -> list[str]:
        """Return place and word of every banned word in docstrings and comments."""
        if not BANNED.search(self.text):
            return []
        texts = [*self.docstrings, *self.comments()]
        return [f"{self.place}:{line}: {word}" for line, text in texts for word in BANNED.findall(CODE.sub("", text))]

    def functions(self) -> dict[str, int]:
        """Return the lines of every function and method by dotted name."""
        return {
            name: (node.end_lineno or 0) - node.lineno + 1
            for name, node in self.definitions
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }


@cache
def read(folder: str) -> tuple[Source, ...]:
    """Return the Python files below a folder of the repository."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path, text, ast.parse(text)))
    return tuple(found)


def library() -> tuple[Source, ...]:
    return read("src/davae")


def top_level_imports(source: Source, modules: set[str]) -> set[str]:
    """Return what importing a module imports at once: davae's modules, and first names of other packages."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found.add(alias.name if alias.name in modules else alias.name.split(".")[0])
            elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    outer = node.module if node.module in modules else node.module.split(".")[0]
                    found.add(inner if inner in modules else outer)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                visit([*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)])
            elif isinstance(node, (ast.With, ast.ClassDef)):
                visit(node.body)

    visit(source.tree.body)
    return found - {source.module}


@cache
def imports() -> dict[str, set[str]]:
    modules = {source.module for source in library()}
    return {source.module: top_level_imports(source, modules) for source in library()}


def over(counts: dict[str, list[str]], ceilings: dict[str, int]) -> list[str]:
    """Return a line for each package with more findings than its ceiling, with the first of them."""
    return [
        f"{name}: {len(places)} of at most {ceilings.get(name, 0)}:\n  " + "\n  ".join(places[:60])
        for name, places in sorted(counts.items())
        if len(places) > ceilings.get(name, 0)
    ]


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_no_file_is_over_400_lines():
    long = {source.place: source.text.count("\n") for source in library()}
    assert not {place: lines for place, lines in long.items() if lines > LONG_FILES.get(place, FILE_LINES)}


def test_no_function_is_over_60_lines():
    found = {name: lines for source in library() for name, lines in source.functions().items()}
    assert not {name: lines for name, lines in found.items() if lines > LONG_FUNCTIONS.get(name, FUNCTION_LINES)}


def test_the_method_fits_its_budget():
    files = {path for pattern in CORE for path in (SOURCE / "davae").glob(pattern)}
    assert len(files) >= 18
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in files) <= max(CORE_LINES, CORE_LINES_NOW)


def test_packages_fit_their_budgets():
    lines: dict[str, int] = {}
    for source in library():
        lines[source.package] = lines.get(source.package, 0) + source.text.count("\n")
    assert not {name: count for name, count in lines.items() if name not in CEILINGS or count > CEILINGS[name].lines}


# -- names and imports -----------------------------------------------------------------------------------------------


def test_no_public_name_is_defined_twice():
    homes: dict[str, list[str]] = {}
    for source in library():
        for node in source.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(source.module)
    twins = {name: modules for name, modules in homes.items() if len(set(modules)) > 1 and name not in TWINS.split()}
    assert not twins


def test_modules_import_each_other_one_way():
    graph = {name: {other for other in found if other in imports()} for name, found in imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_help_imports_neither_torch_nor_pydantic():
    """Everything that `davae.cli` imports at once, packages above included."""
    seen: set[str] = set()
    due = ["davae.cli"]
    while due:
        name = due.pop()
        if name not in seen:
            seen.add(name)
            parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
            due += imports().get(name, set()) | (parents & imports().keys())
    assert "typer" in seen
    assert not seen & {
        "torch",
        "diffusers",
        "transformers",
        "gradio",
        "numpy",
        "matplotlib",
        "accelerate",
        "pydantic",
        "yaml",
    }


def test_public_names_are_those_promised_and_are_where_they_are_looked_up():
    assert sorted(davae.__all__) == sorted(PUBLIC.split())
    trees = {source.module: source.tree for source in library()}
    for name in davae.__all__:
        defined = {getattr(node, "name", None) for node in trees[HOMES[name]].body}
        assert name in defined, name


# -- words -----------------------------------------------------------------------------------------------------------


def prose() -> tuple[Source, ...]:
    return (*library(), *read("benchmarks"), *read("scripts"))


def test_docstrings_and_comments_use_no_banned_word():
    found: dict[str, list[str]] = {}
    for source in prose():
        found.setdefault(source.package, []).extend(source.banned())
    wrong = over(found, {name: ceiling.words for name, ceiling in CEILINGS.items()})
    assert not wrong, "\n".join(wrong)


def test_pages_use_no_banned_word():
    found: dict[str, list[str]] = {}
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        words = BANNED.findall(CODE.sub("", page.read_text(encoding="utf-8")))
        found.setdefault("pages", []).extend(f"{page.name}: {word}" for word in words)
    wrong = over(found, {"pages": PAGE_WORDS})
    assert not wrong, "\n".join(wrong)


def fault(docstring: str) -> str | None:
    """Return what is wrong with the first line of a docstring."""
    first = docstring.splitlines()[0]
    if OPENINGS.match(first):
        return f"opens with {first.split()[0]}"
    if len(first) > FIRST_LINE:
        return f"{len(first)} characters"
    if ";" in first:
        return "semicolon"
    return None if first.endswith(".") else "the first line does not end with a period"


def test_first_lines_of_docstrings():
    found: dict[str, list[str]] = {}
    for source in prose():
        for line, text in source.docstrings:
            wrong = fault(text)
            if wrong is not None:
                found.setdefault(source.package, []).append(f"{source.place}:{line}: {wrong}")
    lines = over(found, {name: ceiling.openings for name, ceiling in CEILINGS.items()})
    assert not lines, "\n".join(lines)
