"""`davae app`: the page to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def app(
    model: Annotated[
        str, typer.Argument(help="`micro`, a run or pipeline folder, or a hub id: an upgraded model, or a base.")
    ] = "micro",
    base: Annotated[
        str | None, typer.Option(help="The base of an upgraded pipeline, where no run's recipe tells it.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    runs: Annotated[Path, typer.Option(help="Folder for the trainings that the page starts.")] = Path("runs/app"),
) -> None:
    """Draw, reconstruct, inspect and train in a browser. Needs `pip install "davae[app]"`. Examples:

    `davae app`

    `davae app runs/sd35 --port 8000`

    `davae app path/to/upgraded --base path/to/sd3.5-medium`

    Whoever reaches the page can compute on this machine, and train on any folder of pictures it names.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        from davae.train.state import RunError

        raise RunError('the page needs Gradio; install it with: pip install "davae[app]"') from error
    from davae.app.models import open_pair
    from davae.app.page import serve
    from davae.display import console

    pair = open_pair(model, base)
    console.print(f"http://{host}:{port} (Ctrl-C ends it)", markup=False)
    serve(pair, runs, host, port)
