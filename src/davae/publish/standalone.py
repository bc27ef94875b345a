"""One module out of davae's own sources, for folders that load without davae.

diffusers runs the code that a pipeline folder brings along (`trust_remote_code=True`), one file a component. So all that a
class needs is written into one file: the definitions that it reaches, module by module, and the imports that these use.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import davae
from davae.homes import HOMES

HEADER = '''"""{name} of davae {version}, for folders that load without it: written by `davae export --self-contained`.

Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0. The same code, in parts and with its tests, is davae's.
"""

from __future__ import annotations
'''


@dataclass
class Definition:
    """One top-level statement: where it stands, its text, and every name that it reads."""

    module: str
    text: str
    reads: set[str]
    lazy: bool  # imports davae when it runs


@dataclass
class Sources:
    """Top-level definitions and imports of davae's modules, imported ones first."""

    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)  # bound name -> statement
    modules: list[str] = field(default_factory=list)


def home_module(class_name: str) -> str:
    """Last part of the name of the module that defines one of davae's public classes."""
    return HOMES[class_name].rpartition(".")[2]


def standalone_source(class_name: str) -> str:
    """Return the source of a module that defines a public class without importing davae.

    Raises:
        ValueError: something that one file cannot hold: two definitions of a name, a late import of davae.
    """
    sources = Sources()
    _read(HOMES[class_name], sources)
    kept: list[Definition] = []
    imports: set[str] = set()
    pending, seen = [class_name], {class_name}
    while pending:
        name = pending.pop()
        found = sources.definitions.get(name, [])
        if len({definition.module for definition in found}) > 1:
            raise ValueError(
                f"{' and '.join(d.module for d in found)} both define {name}: one of them needs another name"
            )
        if not found and name in sources.imports:
            imports.add(sources.imports[name])
        for definition in found:
            if definition.lazy:
                raise ValueError(
                    f"{name} in {definition.module} imports davae when it runs; import at the top instead"
                )
            kept.append(definition)
            pending += definition.reads - seen
            seen |= definition.reads
    kept = [d for ds in sources.definitions.values() for d in ds if d in kept]
    kept.sort(key=lambda definition: sources.modules.index(definition.module))
    parts = dict.fromkeys(definition.text for definition in kept)
    header = HEADER.format(name=class_name, version=davae.__version__)
    return "\n\n\n".join([header + "\n" + "\n".join(sorted(imports)), *parts]) + "\n"


def _read(module: str, sources: Sources) -> None:
    """Add a module's definitions, after those of the davae modules that it imports."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in tree.body:
        if _of_davae(node) and node.module not in sources.modules:  # type: ignore[attr-defined]
            _read(node.module, sources)  # type: ignore[attr-defined]
    sources.modules.append(module)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _add_imports(node, sources)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            for name in _names(node):
                definition = Definition(module, _text(node, text), _reads(node), any(map(_of_davae, ast.walk(node))))
                sources.definitions.setdefault(name, []).append(definition)


def _of_davae(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "davae" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "davae"


def _add_imports(node: ast.Import | ast.ImportFrom, sources: Sources) -> None:
    source = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        renamed = f" as {alias.asname}" if alias.asname else ""
        if _of_davae(node):
            package = isinstance(node, ast.ImportFrom) and f"{node.module}.{alias.name}" in _modules()
            if renamed or not source or package:
                raise ValueError(
                    f"{source}import {alias.name}{renamed}: import the names themselves; one file has no modules"
                )
        elif source != "from __future__ ":
            bound = alias.asname or alias.name.split(".")[0]
            sources.imports[bound] = f"{source}import {alias.name}{renamed}"


@cache
def _modules() -> set[str]:
    """Full names of davae's modules."""
    root = Path(davae.__file__).parent
    return {".".join(("davae", *file.relative_to(root).with_suffix("").parts)) for file in root.rglob("*.py")}


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines.

    `X.__module__ = "davae"` defines nothing: a single file is its own home.
    """
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _reads(node: ast.stmt) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _text(node: ast.stmt, text: str) -> str:
    """Return a statement's lines, with its decorators and the comment above it."""
    lines = text.splitlines()
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])
