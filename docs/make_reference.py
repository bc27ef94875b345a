"""Write docs/reference/recipes.md from the schema of recipes and docs/reference/commands.md from the command line.

python docs/make_reference.py
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from davae.cli import app
from davae.recipes.base import BaseRecipe
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.recipes.upgrade import Recipe

FOLDER = Path(__file__).parent / "reference"
KINDS = (
    ("Upgrade recipes", "`davae upgrade`, `train-vae`, `cache-latents`, `train-dit`.", Recipe),
    ("Base recipes", "`kind: base`, for `davae train-base`.", BaseRecipe),
    ("Super-resolution recipes", "`kind: super-resolution`, for `davae train-sr`.", SuperResolutionRecipe),
)
PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}


def cell(text: str) -> str:
    """Return text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# -- recipes -----------------------------------------------------------------------------------------------------------


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def type_name(annotation: Any) -> str:
    """Return a type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part) for part in arguments))
    if origin is tuple:
        inner = type_name(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} of {inner}"
    if origin is dict:
        return f"{type_name(arguments[0])} to {type_name(arguments[1])}"
    return "section" if sections_in(annotation) else PLAIN.get(annotation, str(annotation))


def default_of(field: FieldInfo) -> str:
    """Return a field's default as YAML has it."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "none"
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`"


def keys(model: type[BaseModel], prefix: str = "", seen: tuple[type, ...] = ()) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted path, field) of every key of a recipe; a recipe inside a recipe is one key."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for section in sections_in(field.annotation):
            if section not in (*seen, BaseRecipe):
                yield from keys(section, f"{prefix}{name}.", (*seen, model))


def recipes_page() -> str:
    """Return the reference of every recipe key."""
    lines = [
        "# Recipe keys",
        "",
        "Made by `python docs/make_reference.py` from the schema. Change a value with `--set KEY=VALUE`.",
        "",
        "Two pairs of names are easily confused. `lr_warmup_steps` raises the **learning rate** from 0, in every training;",
        "`stage2.warmup_steps` is N_warm of Eq. 12 and fades in the **loss of the detail channels**.",
        "`batch_size` is one batch, `accumulation` the number of batches of one optimizer step: a step trains on",
        "`batch_size` x `accumulation` images.",
    ]
    for title, use, model in KINDS:
        lines += ["", f"## {title}", "", use, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        rows: dict[str, FieldInfo] = {}
        for path, field in keys(model):
            rows.setdefault(path, field)
        for path, field in rows.items():
            words = (type_name(field.annotation), default_of(field), field.description or "")
            lines.append(f"| `{path}` | {' | '.join(map(cell, words))} |")
    return "\n".join(lines) + "\n"


# -- commands ----------------------------------------------------------------------------------------------------------


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (words, command) of every verb."""
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


def option_default(option: Any) -> str:
    """Return what an option is without being typed."""
    if option.required:
        return "required"
    value = option.default
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def usage(argument: Any) -> str:
    """Return an argument as the usage line shows it: in brackets where it can be left out, with dots where it repeats."""
    name = str(argument.metavar or argument.name).upper().strip("[].") + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def commands_page() -> str:
    """Return the reference of every verb."""
    lines = [
        "# Commands",
        "",
        "Made by `python docs/make_reference.py` from the command line. Every verb takes `-h`, `-v` (more) and `-q` (less).",
    ]
    for words, verb in verbs(typer.main.get_command(app)):
        arguments = [p for p in verb.params if p.param_type_name == "argument"]
        options = [
            p for p in verb.params if p.param_type_name == "option" and p.name not in ("help", "verbose", "quiet")
        ]
        named = " ".join(usage(p) for p in arguments)
        lines += ["", f"## davae {words}", "", f"`davae {words}{' ' + named if named else ''} [OPTIONS]`", ""]
        lines += [verb.help.strip()]
        if arguments or options:
            lines += ["", "| option | default | meaning |", "|---|---|---|"]
        for one in arguments:
            lines.append(
                f"| {str(one.metavar or one.name).upper()} | {option_default(one)} | {cell(one.help or '')} |"
            )
        for one in options:
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            lines.append(f"| {names} | {option_default(one)} | {cell(one.help or '')} |")
    return "\n".join(lines) + "\n"


PAGES = {"recipes.md": recipes_page, "commands.md": commands_page}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
