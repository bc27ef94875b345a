"""`davae` alone: what to do next."""

from __future__ import annotations

from typing import Annotated

import typer

from davae.recipes.commands import forbid_commands

NEXT = """davae gives a pretrained latent diffusion model twice the resolution at the same token count.

See it work, nothing to download:
  davae sample micro-upgraded "a red rose"   images of the embedded, upgraded model
  davae app                                  the same in a browser (needs the extra davae[app])

Upgrade a model:
  davae upgrade micro --out runs/micro       the embedded one: hours on two CPU cores
  davae inspect MODEL --resolution 1024      what an upgrade would bring for yours
  davae recipes                              where to start from
  davae upgrade RECIPE --dry-run             what it would take

Measure it:
  davae evaluate --help                      images, reconstructions, prompts
  davae analyze --help                       the paper's figures for a run

All verbs: davae --help. One verb, with examples: davae VERB --help.
Tab completion: davae --install-completion
"""


def version(shown: bool) -> None:
    if shown:
        from davae import __version__

        typer.echo(f"davae {__version__}")
        raise typer.Exit


def start(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    forbid_commands()  # before the verb's own options are read, which may permit some
    if context.invoked_subcommand is None:
        typer.echo(NEXT, nl=False)
