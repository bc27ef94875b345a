"""The command class of every verb: numbers are finite and within bounds before the verb begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from davae.errors import RecipeError

# Far above what any model takes; a slip of the keyboard must not take all memory first.
LARGEST = {
    "num": 10**8,
    "steps": 10_000,
    "repeats": 10_000,
    "resolution": 16_384,
    "compare_at": 16_384,
    "tile": 16_384,
    "batch_size": 65_536,
    "batch": 65_536,
    "detail_channels": 65_536,
    "shard_size": 10**6,
    "scale": 64,
    "blocks": 1024,
    "seeds": 10_000,
    "seed": 2**62,
}
POSITIVE = ("resolution", "compare_at", "tile")  # sizes in pixels
LARGEST_INT, LARGEST_FLOAT = 10**9, 1e30


class Verb(TyperCommand):
    """A command whose options are checked in one place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            name = parameter.name or ""
            shown = next((word for word in parameter.opts if word.startswith("-")), name)
            value = ctx.params.get(name)
            for one in value if isinstance(value, (list, tuple)) else (value,):
                check_value(name, shown, one)
        return rest


def check_value(name: str, shown: str, value: Any) -> None:
    """Refuse a number that is not finite or out of bounds, and text that is not Unicode.

    Args:
        name: the option's name in `LARGEST`.
        shown: how the person writes it, for the message.

    Raises:
        RecipeError: names the option, what was found and the bound.
    """
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= LARGEST_FLOAT):
        raise RecipeError(f"{shown}: found {value}; use a finite number up to {LARGEST_FLOAT:g}")
    if isinstance(value, int):
        low = 1 if name in POSITIVE else 0
        high = LARGEST.get(name, LARGEST_INT)
        if not low <= value <= high:
            raise RecipeError(f"{shown}: found {value}; use a number from {low} to {high}")
    if isinstance(value, (str, Path)):
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"{shown}: {str(value)[:60]!r} is not UTF-8 text") from error


class Verbs(typer.Typer):
    """A group of verbs, each a `Verb`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:  # type: ignore[override]
        return super().command(name, **{"cls": Verb, **options})
