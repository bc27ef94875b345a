"""`davae app`: the page to try things on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer


def app_verb(
    model: Annotated[
        str, typer.Argument(help="`micro`, a run or pipeline folder, or a hub id: an upgraded model, or a base.")
    ] = "micro",
    base: Annotated[
        str | None, typer.Option(help="The base of an upgraded pipeline, where no run's recipe names it.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs --auth.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which browsers may ask for the page; may be repeated."),
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(
            envvar="DAVAE_APP_AUTH",
            help="user:password, asked for besides the token. Others see a command line; use the variable or a file.",
            show_envvar=True,
        ),
    ] = None,
    auth_file: Annotated[
        Path | None, typer.Option(help="File with user:password on its first line, readable by you alone.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of image folders and .tar files that the page may train on.")
    ] = None,
    models_root: Annotated[
        Path | None, typer.Option(help="Folder of models and run folders that the page may inspect.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder for the trainings that the page starts.")] = Path("runs/app"),
) -> None:
    """Draw, reconstruct, inspect and train in a browser. Needs `pip install "davae[app]"`.

    `davae app`

    `davae app runs/sd35 --port 8000 --data-root my_images/`

    `davae app path/to/upgraded --base path/to/sd3.5-medium`

    `davae app --host 0.0.0.0 --auth-file password.txt --allow-host gpu.example.org`

    Open the address that it prints: its token lets you in. Who has it can compute on this machine.
    """
    check_installed()
    from davae.app.access import grant, private_environment, read_auth
    from davae.app.page import serve
    from davae.app.pair import open_pair
    from davae.app.roots import open_roots

    check_free(host, port)  # before the model is loaded
    access = grant(host, allow_host or (), read_auth(auth, auth_file))
    private_environment()
    roots = open_roots(data_root, models_root, model.removesuffix("-upgraded"))
    serve(open_pair(model, base), runs, access, port, roots)


def check_installed() -> None:
    """Refuse a system without fcntl, and an installation without Gradio.

    Raises:
        RunError: names what is missing and what to do.
    """
    from davae.errors import RunError

    try:
        import fcntl  # noqa: F401 - its locks, and processes that are forked, guard the page
        import resource  # noqa: F401
    except ModuleNotFoundError as error:
        raise RunError("davae app: this system has no fcntl; the page needs Linux or macOS, or WSL") from error
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise RunError('the page needs Gradio; install it with: pip install "davae[app]"') from error


def check_free(host: str, port: int) -> None:
    """Refuse an address that another program listens on, or that is not one of this machine.

    Raises:
        RunError: names the port and what to do.
    """
    from davae.errors import RunError

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunError(
            f"--host {host} --port {port}: {reason}; use another port, as --port {port % 65535 + 1}"
        ) from error
