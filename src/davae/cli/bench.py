"""`davae bench`: figures of speed, each on the machine that asks."""

from __future__ import annotations

import typer

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
