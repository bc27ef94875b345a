"""The page itself: four tabs in one Gradio app, served beside the reports of its trainings."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from davae.app.models import Pair
from davae.app.tabs import generate_tab, inspect_tab, reconstruct_tab
from davae.app.train_tab import train_tab
from davae.app.training import Trainings
from davae.app.uploads import MAX_BYTES
from davae.train.state import RunError

QUEUE = 32  # visitors that may wait; the next is told so

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.small img { image-rendering: pixelated; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""


def build(pair: Pair, trainings: Trainings) -> gr.Blocks:
    """The four tabs around a pair of models and a folder of trainings."""
    with gr.Blocks(title=f"davae: {pair.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# davae\n{_lead(pair)}")
        with gr.Tab("Generate", id="generate"):
            generate_tab(pair)
        with gr.Tab("Reconstruct", id="reconstruct"):
            reconstruct_tab(pair)
        with gr.Tab("Inspect", id="inspect"):
            inspect_tab(pair.name)
        with gr.Tab("Train", id="train"):
            train_tab(trainings)
    page.queue(max_size=QUEUE, default_concurrency_limit=8)
    return page


def _lead(pair: Pair) -> str:
    size, scale = pair.resolution, pair.scale
    if pair.upgraded is None:
        return f"`{pair.name}` is a base model. Open an upgraded one to compare: `davae app micro`."
    text = f"`{pair.name}` draws {size} pixels with the tokens of {size // scale}: {scale} times the size at the same cost."
    return text if pair.base is not None else f"{text} Its base is not open; name it with `--base` to compare."


def build_server(pair: Pair, trainings: Trainings) -> FastAPI:
    """The page at `/`, and the report of each training at `/reports/NAME`."""
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
    return gr.mount_gradio_app(
        server,
        build(pair, trainings),
        "/",
        max_file_size=MAX_BYTES,
        show_error=False,
        footer_links=[],
        theme=theme,
        css=CSS,
        ssr_mode=False,
    )


def serve(pair: Pair, runs: Path, host: str, port: int) -> None:
    """Serve until interrupted; a training that runs then is asked to save."""
    trainings = Trainings(runs)
    try:
        uvicorn.run(build_server(pair, trainings), host=host, port=port, log_level="warning")
    finally:
        trainings.close()
