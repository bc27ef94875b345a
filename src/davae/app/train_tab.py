"""What the tab Train shows and what its buttons do."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from davae.app.previews import preview
from davae.app.tabs import COMPUTE, USERS, line_of
from davae.app.training import Trainings, upgrade_recipes
from davae.app.uploads import MAX_TRAINING_STEPS
from davae.recipes import Recipe, load_recipe

COLOURS = "#4c78a8", "#f58518"  # blue, orange


def told(function: Callable) -> Callable:
    """A handler whose errors that are a visitor's to mend become one line on the page."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except USERS as error:
            raise gr.Error(line_of(error), duration=None, title="Not done", print_exception=False) from error

    return wrapped


def train_tab(trainings: Trainings) -> None:
    choices = upgrade_recipes()
    gr.Markdown(
        "Runs `davae upgrade` on this machine, in a folder of its own. Without pictures of yours it trains on the "
        "recipe's. With `micro`, 100 steps of each stage take minutes; its full recipe takes hours."
    )
    with gr.Row():
        name = gr.Textbox(f"try-{time.strftime('%H%M%S')}", label="Name", elem_id="training-name", max_lines=1)
        recipe = gr.Dropdown(
            choices, value="micro", label="Recipe, or a YAML file", allow_custom_value=True, elem_id="recipe"
        )
        stage1 = gr.Number(
            100, label="Steps of stage 1", precision=0, minimum=1, maximum=MAX_TRAINING_STEPS, elem_id="steps-1"
        )
        stage2 = gr.Number(
            100, label="Steps of stage 2", precision=0, minimum=1, maximum=MAX_TRAINING_STEPS, elem_id="steps-2"
        )
    with gr.Row():
        folder = gr.Textbox(
            label="Pictures: a folder or .tar on this machine",
            elem_id="training-data",
        )
        files = gr.File(label="or upload pictures and .txt captions", file_count="multiple", height=170)
        more = gr.Textbox(label="Other values: a.b=c, one a line", lines=4, elem_id="training-values")
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="start-training")
        pause = gr.Button("Pause", elem_id="pause-training")
        resume = gr.Button("Resume", elem_id="resume-training")
        old = gr.Dropdown([], value=None, label="An earlier training", allow_custom_value=False)
    state = gr.Markdown("Nothing started.", elem_id="training-state")
    link = gr.Markdown(elem_id="training-report")
    with gr.Row():
        plots = [
            gr.LinePlot(
                x="step",
                y="value",
                color="curve",
                label=label,
                height=300,
                elem_id=f"curve-{number}",
                color_map=dict(zip(curves, COLOURS, strict=True)),
            )
            for number, (label, curves) in enumerate(
                (
                    ("Stage 1: L1 (blue), alignment (orange)", ("L1", "alignment")),
                    ("Stage 2: velocity error of base (blue) and detail (orange)", ("base", "detail")),
                )
            )
        ]
    gallery = gr.Gallery(
        label="Newest checkpoint",
        columns=4,
        height="auto",
        format="png",
        elem_classes=["small"],
        elem_id="checkpoint",
    )
    shown = gr.State("")  # the training this visitor watches
    checkpoint = gr.State("")  # the one whose pictures are shown

    def begin(
        title: str, which: str, data: str, uploads: list[str] | None, values: str, first: float, second: float
    ) -> str:
        overrides = [line.strip() for line in values.splitlines() if line.strip()]
        chosen = load_recipe(which)
        warmup = min(chosen.stage2.warmup_steps, int(second) // 4) if isinstance(chosen, Recipe) else 0
        sizes = [f"stage1.max_steps={int(first)}", f"stage2.max_steps={int(second)}", f"stage2.warmup_steps={warmup}"]
        trainings.start(
            title.strip(),
            which,
            data=data.strip() or None,
            uploads=[Path(path) for path in uploads] if uploads else None,
            overrides=[*sizes, *overrides],
        )
        return title.strip()

    def go_on(title: str) -> str:
        trainings.resume(title)
        return title

    def stop(title: str) -> str:
        trainings.pause(title)
        return title

    def look(title: str) -> list[Any]:
        known = gr.update(choices=trainings.names())
        if not title:
            return ["Nothing started.", "", None, None, known]
        now = trainings.state(title)
        curves = [pd.DataFrame(rows) if rows else None for rows in trainings.curves(title).values()]
        open_it = f"[Open the report](/reports/{title})" if now.finished else ""
        return [f"**{title}** {now.line}", open_it, *curves, known]

    def pictures(title: str, seen: str) -> list[Any]:
        if not title:
            return [gr.skip(), seen]
        newest = trainings.newest_checkpoint(title)
        if newest == seen or not newest:
            return [gr.skip(), seen]
        return [preview(trainings.folder(title)), newest]

    view = [state, link, *plots, old]
    values = [name, recipe, folder, files, more, stage1, stage2]
    start.click(told(begin), values, shown, api_visibility="private").success(
        look, shown, view, api_visibility="private"
    )
    pause.click(told(stop), shown, shown, api_visibility="private")
    resume.click(told(go_on), shown, shown, api_visibility="private")
    old.input(lambda title: (title, ""), old, [shown, checkpoint], api_visibility="private").then(
        look, shown, view, api_visibility="private"
    )
    gr.Timer(2).tick(told(look), shown, view, show_progress="hidden", api_visibility="private")
    gr.Timer(5).tick(
        told(pictures),
        [shown, checkpoint],
        [gallery, checkpoint],
        show_progress="hidden",
        api_visibility="private",
        **COMPUTE,
    )
