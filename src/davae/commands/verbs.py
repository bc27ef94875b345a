"""Command class of every verb, which checks all numbers before the verb begins."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

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


UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # click's, whether typer brings its own click along or not

# Options of other programs that users type, and what davae has for them.
HINTS = {
    "--resume": "run the same command again on the same --out: it goes on where it stopped",
    "--resume-from-checkpoint": "run the same command again on the same --out: it goes on where it stopped",
    "--max-steps": "use --set stage1.max_steps=N and --set stage2.max_steps=N",
    "--max-train-steps": "use --set stage1.max_steps=N and --set stage2.max_steps=N",
    "--learning-rate": "use --set stage1.lr=X or --set stage2.lr=X",
    "--train-batch-size": "use --set stage1.batch_size=N or --set stage2.batch_size=N",
    "--mixed-precision": "use --set run.mixed_precision=bf16",
    "--resolution": "use --set base.resolution=N; the upgrade draws `scale` times as many pixels a side",
    "--seed": "use --set run.seed=N",
    "--output-dir": "use --out",
    "--output": "use --out",
    "--dataset-name": "use --data",
    "--train-data-dir": "use --data",
    "--pretrained-model-name-or-path": "use --set base.model=PATH",
    "--model": "give the model as the first argument, or --set base.model=PATH for a recipe",
    "--prompt": "give the prompt as an argument, in quotes",
    "--num-images": "use --num",
    "--num-images-per-prompt": "use --num",
    "--scale": "use --times 2 of `davae upscale` for four times the size, or --set scale=N of a recipe",
    "--cfg": "use --guidance",
    "--cfg-scale": "use --set sampling.guidance_scale=X",
    "--device": "set CUDA_VISIBLE_DEVICES; davae takes the GPU that it finds",
    "--negative-prompt": "only `davae sample` takes one",
    "--lora": "only `davae sample` takes one; stage 2's own is --set stage2.lora.rank=N",
    "--prompt-file": "only `davae sample` takes one; `davae evaluate prompts` has --prompts",
    "--height": "images here are squares; use --resolution where the verb has it",
    "--width": "images here are squares; use --resolution where the verb has it",
    "--num-inference-steps": "use --set sampling.steps=N",
    "--guidance-scale": "use --set sampling.guidance_scale=X",
    "--steps": "use --set stage1.max_steps=N and --set stage2.max_steps=N",
}
# names that other programs have for options of davae, accepted wherever a verb has the option
ALIASES = {"--num-inference-steps": "--steps", "--guidance-scale": "--guidance", "--cfg-scale": "--guidance"}
ALIKE = 0.75  # how much a word must resemble an option to be taken for a slip of the keyboard


def with_own_names(args: list[str], known: set[str]) -> list[str]:
    """Return arguments with the names of other programs replaced by davae's, where the verb has the option.

    Args:
        known: options of the verb.
    """
    renamed = []
    for place, word in enumerate(args):
        if word == "--":
            return renamed + args[place:]
        name, equals, value = word.partition("=")
        own = ALIASES.get(name.replace("_", "-"), name)
        renamed.append(f"{own}{equals}{value}" if name not in known and own in known else word)
    return renamed


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show more: libraries' messages, tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and results alone.")]


def with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a verb's function that takes `-v` and `-q` besides its own options."""

    @functools.wraps(function)
    def verb(*args: Any, verbose: bool = False, quiet: bool = False, **options: Any) -> Any:
        if verbose or quiet:
            from davae.commands.verbosity import set_verbosity

            set_verbosity(-1 if quiet else 1)
        return function(*args, **options)

    own = inspect.signature(function, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in {"verbose": Verbose, "quiet": Quiet}.items()
    ]
    verb.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    verb.__annotations__ = {}  # typer reads the signature, and would evaluate these again, four times a verb
    return verb


def hint(word: str, options: list[str]) -> str:
    """Return what to type instead of an unknown option.

    Args:
        options: names that the verb knows.
    """
    plain = word.partition("=")[0].replace("_", "-")
    if plain in options:
        return f"did you mean {plain}?"
    if plain in HINTS:
        return HINTS[plain]
    close = difflib.get_close_matches(plain, options, n=1, cutoff=ALIKE)
    return f"did you mean {close[0]}?" if close else "`--help` lists the options"


class Verb(TyperCommand):
    """A command whose options are checked in one place. All verbs take `-v` and `-q`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {word for p in self.get_params(ctx) for word in p.opts}
        try:
            rest = super().parse_args(ctx, with_own_names(args, known))
        except UsageError as error:
            if type(error).__name__ != "NoSuchOption":
                raise
            options = [word for word in known if word.startswith("--")]
            word = error.option_name  # type: ignore[attr-defined]
            raise RecipeError(f"{word}: `{ctx.command_path}` has no such option; {hint(word, options)}") from error
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
        register = super().command(name, **{"cls": Verb, **options})

        def command(function: Callable[..., Any]) -> Callable[..., Any]:
            register(with_verbosity(function))
            return function

        return command
