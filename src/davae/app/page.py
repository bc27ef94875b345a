"""The page: five tabs in one Gradio app, served with the reports of its trainings."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
from functools import cache
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from davae.app.about import model_facts
from davae.app.access import Access
from davae.app.enlarge_tab import EnlargeTab
from davae.app.forms import escape_markup
from davae.app.generate_tab import GenerateTab
from davae.app.guard import Guard
from davae.app.inspect_tab import InspectTab
from davae.app.limits import LOCK, Bounds
from davae.app.pair import Pair
from davae.app.reconstruct_tab import ReconstructTab
from davae.app.roots import Roots, label
from davae.app.train_tab import TrainTab
from davae.app.training import Trainings
from davae.app.uploads import MAX_BYTES
from davae.console import console
from davae.errors import RunError

QUEUE = 32  # events that may wait; the next is refused
SESSIONS = 64  # visitors whose images are kept in memory
CONNECTIONS = 256
FOLDER = "davae-app-"

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.small img { image-rendering: pixelated; }
.framed img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
@media (max-width: 600px) {
    .gradio-container .main { padding: 12px !important; }
    .tab-container button { padding: 0 5px !important; font-size: 12px !important; }
}
"""


def build(pair: Pair, trainings: Trainings, roots: Roots | None = None) -> gr.Blocks:
    """Return the five tabs around a pair of models and a folder of trainings.

    Args:
        pair: the models.
        trainings: those that the page starts and shows.
        roots: folders whose entries the page offers by name; by default none.
    """
    roots = roots or Roots(model=pair.name.removesuffix("-upgraded"))
    uploads = upload_folder()
    title = f"davae: {label(pair.name)}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# davae\n{_lead(pair)}", elem_id="lead")
        with gr.Tab("Generate", id="generate"):
            GenerateTab(pair).connect_visit(page)
        with gr.Tab("Reconstruct", id="reconstruct") as tab:
            ReconstructTab(pair, uploads, tab)
        with gr.Tab("Enlarge", id="enlarge") as tab:
            EnlargeTab(pair, uploads, tab)
        with gr.Tab("Inspect", id="inspect"):
            InspectTab(roots)
        with gr.Tab("Train", id="train"):
            TrainTab(trainings, roots, uploads)
    page.queue(max_size=QUEUE, default_concurrency_limit=8, api_open=False)
    # Gradio checks the files that arguments name only in a page that was launched; a mounted one is not.
    page.has_launched = True
    page.state_session_capacity = SESSIONS
    return page


@cache
def upload_folder() -> Path:
    """Return the folder of uploads and drawn images of this process, readable by its user alone.

    It is removed when the process ends, or by the next page where the process was killed. Gradio takes it from the
    environment.
    """
    remove_left_folders(Path(tempfile.gettempdir()))
    folder = tempfile.TemporaryDirectory(prefix=FOLDER)
    path = Path(os.path.realpath(folder.name))
    lock = (path / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def remove() -> None:
        lock.close()
        folder.cleanup()

    atexit.register(remove)
    os.environ["GRADIO_TEMP_DIR"] = str(path)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(path / "examples")
    return path


def remove_left_folders(temporary: Path) -> None:
    """Remove the folders of uploads of pages that were killed: nobody holds their lock."""
    for lock in temporary.glob(f"{FOLDER}*/{LOCK}"):
        if lock.is_symlink() or lock.parent.is_symlink() or lock.parent.lstat().st_uid != os.getuid():
            continue
        with lock.open("r") as stream, contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _lead(pair: Pair) -> str:
    """Return the sentences about the model above the tabs."""
    lines = [f"**{escape_markup(label(pair.name))}** is open.", *(escape_markup(line) for line in model_facts(pair))]
    if pair.upgraded is None:
        lines.append("Open an upgraded model to compare: `davae app micro`.")
    elif pair.base is None:
        lines.append("Its base is not open; name it with `--base` to compare.")
    return " ".join(lines)


def build_server(
    pair: Pair,
    trainings: Trainings,
    access: Access | None = None,
    roots: Roots | None = None,
    bounds: Bounds | None = None,
) -> Guard:
    """Return the page at `/` and the reports of trainings at `/reports/NAME`, behind the guard.

    Args:
        pair: the models.
        trainings: those that the page starts and shows.
        access: hosts and secrets; by default those of a page on this machine, with a new token.
        roots: folders whose entries the page offers by name; by default none.
        bounds: of requests.
    """
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @server.get("/reports/{name}")
    def report(name: str) -> Response:
        try:
            page = trainings.report(name)
        except RunError as error:
            return PlainTextResponse(str(error), 404)
        return PlainTextResponse(f"training '{name}' has no report yet", 404) if page is None else FileResponse(page)

    theme = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],  # nothing is fetched from another server
    )
    blocks = build(pair, trainings, roots)
    page = gr.mount_gradio_app(
        server,
        blocks,
        "/",
        allowed_paths=[],  # of Gradio's own routes; what lies outside the folder of uploads has a route of ours
        max_file_size=MAX_BYTES,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        theme=theme,
        css=CSS,
        ssr_mode=False,
    )
    inputs = {number: len(function.inputs) for number, function in blocks.fns.items()}
    return Guard(page, access or Access(), upload_folder(), bounds, inputs)


def serve(pair: Pair, runs: Path, access: Access, port: int, roots: Roots | None = None) -> None:
    """Serve the page until it is interrupted, then let a training that runs save.

    Args:
        pair: the models.
        runs: folder of the trainings.
        access: hosts and secrets.
        port: to listen on.
        roots: folders whose entries the page offers by name.

    Raises:
        RunError: the address is taken or not one of this machine.
    """
    trainings = Trainings(runs)
    server = build_server(pair, trainings, access, roots)
    configuration = uvicorn.Config(
        server,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `finally` runs
    with listen(access.host, port) as own:
        console.print(access.address(port), markup=False, highlight=False, soft_wrap=True)
        console.print("Ctrl-C ends it.", markup=False, highlight=False)
        try:
            uvicorn.Server(configuration).run(sockets=[own])
        finally:
            trainings.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: name or address.
        port: number.

    Raises:
        RunError: the address is taken or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
        own.listen(128)
    except OSError as error:
        raise RunError(f"--host {host} --port {port}: {error.strerror or error}; use another") from error
    return own
