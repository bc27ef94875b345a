"""Commands in recipes: only those run that the person typed.

A recipe is data. `data.source: pipe:COMMAND` from a file that somebody else wrote must not start a program, so a command
runs when the same text stands on the command line, or after `--allow-commands`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from davae.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel

PIPE = "pipe:"


@dataclass(frozen=True)
class Permission:
    """Commands that may run.

    Attributes:
        typed: their texts, as the person typed them.
        every: whether all commands may run, whoever wrote them.
    """

    typed: frozenset[str] = frozenset()
    every: bool = False


_NOTHING = Permission()
_permission: ContextVar[Permission] = ContextVar("permission")


def forbid_commands() -> None:
    """Forget every permission: no command of a recipe runs."""
    _permission.set(_NOTHING)


def permit_commands(texts: Iterable[str] = (), *, every: bool = False) -> None:
    """Let commands run that the caller vouches for.

    Args:
        texts: commands, each as the recipe has it (`pipe:cat a.tar`).
        every: let every command run, whoever wrote it.
    """
    now = _permission.get(_NOTHING)
    _permission.set(Permission(now.typed | frozenset(texts), now.every or every))


def typed_commands(overrides: Iterable[str]) -> list[str]:
    """Return the commands in `a.b=c` overrides.

    Raises:
        RecipeError: a value that is not YAML.
    """
    from davae.recipes.values import read_value  # PyYAML is loaded on use: `--help` is instant

    values = [read_value(text, f"--set {path}") for path, _, text in (one.partition("=") for one in overrides)]
    return [text for value in values for text in _texts(value) if text.startswith(PIPE)]


def commands_in(values: Any) -> list[str]:
    """Return the commands among values, however deep."""
    return [text for text in _texts(values) if text.startswith(PIPE)]


def check_commands(recipe: BaseModel) -> None:
    """Refuse a recipe with a command that may not run.

    Raises:
        RecipeError: names the setting and the command.
    """
    for path, source in _sources(recipe, ""):
        check_command_source(source, path)


def check_command_source(source: str, setting: str = "data.source") -> None:
    """Refuse an image source that is a command which nobody typed.

    Raises:
        RecipeError: names the setting and the command.
    """
    permission = _permission.get(_NOTHING)
    if source.startswith(PIPE) and not permission.every and source not in permission.typed:
        raise RecipeError(
            f"{setting}: {source[:200]!r} is a command, and davae runs a command only when you type it yourself; give the "
            "same text with --data or --set, or add --allow-commands if you trust this recipe"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _sources(section: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every `source` in a recipe."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from _sources(value, f"{prefix}{name}.")
        elif name == "source" and isinstance(value, str):
            yield f"{prefix}{name}", value
