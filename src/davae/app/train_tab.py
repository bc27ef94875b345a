"""What the tab Train shows and what its buttons do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from davae.app import forms
from davae.app.forms import escape_markup
from davae.app.previews import checkpoint_images
from davae.app.roots import RECIPES_OWN, Roots
from davae.app.tabs import COMPUTE, as_user_error
from davae.app.training import Trainings, upgrade_recipes
from davae.app.uploads import MAX_IMAGES, MAX_TRAINING_STEPS, uploaded
from davae.recipes import Recipe, load_recipe

COLOURS = "#4c78a8", "#f58518"  # blue, orange
VALUES: dict[str, tuple[str, bool, float, float]] = {  # recipe field -> label, whole, lowest, highest
    "stage1.batch_size": ("Batch of stage 1", True, 1, 256),
    "stage2.batch_size": ("Batch of stage 2", True, 1, 256),
    "stage1.lr": ("Learning rate of stage 1", False, 1e-8, 0.1),
    "stage2.lr": ("Learning rate of stage 2", False, 1e-8, 0.1),
    "run.seed": ("Seed", True, 0, 2**31 - 1),
    "run.checkpoint_every": ("Steps between checkpoints", True, 1, MAX_TRAINING_STEPS),
}


def overrides_of(recipe: Recipe, first: Any, second: Any, values: Sequence[Any]) -> list[str]:
    """Return the overrides that the fields of the page stand for.

    Args:
        recipe: whose warm-up is shortened where stage 2 is.
        first, second: steps of stage 1 and 2.
        values: one for each of VALUES, None for what the recipe has.

    Raises:
        FormError: a value out of its bounds.
    """
    one = forms.integer("steps of stage 1", first, 1, MAX_TRAINING_STEPS)
    two = forms.integer("steps of stage 2", second, 1, MAX_TRAINING_STEPS)
    warmup = min(recipe.stage2.warmup_steps, two // 4)
    overrides = [f"stage1.max_steps={one}", f"stage2.max_steps={two}", f"stage2.warmup_steps={warmup}"]
    for (key, (title, is_whole, low, high)), value in zip(VALUES.items(), values, strict=True):
        if value is not None:
            checked = (
                forms.integer(title, value, int(low), int(high))
                if is_whole
                else forms.number(title, value, low, high)
            )
            overrides.append(f"{key}={checked!r}")
    return overrides


def train_tab(trainings: Trainings, roots: Roots, uploads: Path) -> None:
    choices = upgrade_recipes()
    gr.Markdown(
        "Runs `davae upgrade` on this machine, in a folder of its own. Without pictures of yours it trains on the "
        "recipe's. With `micro`, 100 steps of each stage take minutes; its full recipe takes hours."
    )
    with gr.Row():
        name = gr.Textbox(f"try-{time.strftime('%H%M%S')}", label="Name", elem_id="training-name", max_lines=1)
        recipe = gr.Dropdown(
            choices,
            value="micro",
            label="Recipe",
            allow_custom_value=True,  # a name that is not a choice gets a line, not an alert
            elem_id="recipe",
        )
        stage1 = gr.Number(
            100, label="Steps of stage 1", precision=0, minimum=1, maximum=MAX_TRAINING_STEPS, elem_id="steps-1"
        )
        stage2 = gr.Number(
            100, label="Steps of stage 2", precision=0, minimum=1, maximum=MAX_TRAINING_STEPS, elem_id="steps-2"
        )
    with gr.Row():
        folder = gr.Dropdown(
            roots.data_names(),
            value=RECIPES_OWN,
            label="Images: a folder or .tar below --data-root",
            allow_custom_value=True,
            elem_id="training-data",
        )
        files = gr.File(label="or upload images and .txt captions", file_count="multiple", height=170)
    with gr.Accordion("Other values; the recipe's own where a field is empty", open=False), gr.Row():
        more = [
            gr.Number(
                None,
                label=title,
                precision=0 if is_whole else None,
                minimum=low,
                maximum=high,
                elem_id=f"value-{key.replace('.', '-')}",
            )
            for key, (title, is_whole, low, high) in VALUES.items()
        ]
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

    def begin(title: Any, which: Any, data: Any, sent: Any, first: Any, second: Any, *values: Any) -> str:
        title = forms.text("name", title, 200).strip()
        which = forms.one_of("recipe", forms.text("recipe", which, 200).strip(), choices)
        source = roots.data_source(RECIPES_OWN if data in (None, "") else data)
        paths = uploaded(forms.files("images", sent, 2 * MAX_IMAGES), uploads)
        recipe = load_recipe(which)
        assert isinstance(recipe, Recipe)
        overrides = overrides_of(recipe, first, second, values)
        trainings.start(title, which, data=source, uploads=paths or None, overrides=overrides)
        return title

    def known(title: Any) -> str:
        return forms.one_of("training", title, trainings.names())

    def go_on(title: Any) -> str:
        trainings.resume(known(title))
        return title

    def stop(title: Any) -> str:
        trainings.pause(known(title))
        return title

    def choose(title: Any) -> tuple[str, str]:
        return known(title), ""

    def look(title: str) -> list[Any]:
        names = gr.update(choices=trainings.names())
        title = title or trainings.current()  # one that another page started, or that outlived it
        if not title:
            return ["", "Nothing started.", "", None, None, names]
        now = trainings.state(title)
        curves = [pd.DataFrame(rows) if rows else None for rows in trainings.curves(title).values()]
        open_it = f"[Open the report](/reports/{title})" if now.finished else ""
        return [
            title,
            f"**{escape_markup(title)}** {escape_markup(forms.without_folders(now.line))}",
            open_it,
            *curves,
            names,
        ]

    def pictures(title: str, seen: str) -> list[Any]:
        if not title:
            return [gr.skip(), seen]
        newest = trainings.newest_checkpoint(title)
        if newest == seen or not newest:
            return [gr.skip(), seen]
        return [checkpoint_images(trainings.folder(title)), newest]

    view = [shown, state, link, *plots, old]
    one_at_a_time: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1}
    start.click(
        as_user_error(begin),
        [name, recipe, folder, files, stage1, stage2, *more],
        shown,
        api_visibility="private",
        **one_at_a_time,
    ).success(look, shown, view, api_visibility="private")
    pause.click(as_user_error(stop), shown, shown, api_visibility="private", **one_at_a_time)
    resume.click(as_user_error(go_on), shown, shown, api_visibility="private", **one_at_a_time)
    old.input(as_user_error(choose), old, [shown, checkpoint], api_visibility="private").then(
        look, shown, view, api_visibility="private"
    )
    gr.Timer(2).tick(as_user_error(look), shown, view, show_progress="hidden", api_visibility="private")
    gr.Timer(5).tick(
        as_user_error(pictures),
        [shown, checkpoint],
        [gallery, checkpoint],
        show_progress="hidden",
        api_visibility="private",
        **COMPUTE,
    )
