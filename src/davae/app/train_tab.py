"""The tab Train: `davae upgrade` in a process of its own, its curves and images."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from davae.app import forms
from davae.app.checkpoint_images import checkpoint_images, newest_images_of
from davae.app.forms import escape_markup
from davae.app.roots import RECIPES_OWN, Roots
from davae.app.training import Trainings, upgrade_recipes
from davae.app.uploads import MAX_IMAGES, MAX_TRAINING_STEPS, named, unused_captions, uploaded
from davae.app.widgets import PRIVATE, QUIET, USERS, as_user_error
from davae.recipes import Recipe, load_recipe

COLOURS = "#4c78a8", "#f58518"  # blue, orange
VALUES: dict[str, tuple[str, bool, float, float]] = {  # recipe field -> label, integer, lowest, highest
    "stage1.batch_size": ("Batch of stage 1", True, 1, 256),
    "stage2.batch_size": ("Batch of stage 2", True, 1, 256),
    "stage1.lr": ("Learning rate of stage 1", False, 1e-8, 0.1),
    "stage2.lr": ("Learning rate of stage 2", False, 1e-8, 0.1),
    "run.seed": ("Seed", True, 0, 2**31 - 1),
    "run.checkpoint_every": ("Steps between checkpoints", True, 1, MAX_TRAINING_STEPS),
    "run.sample_every": ("Steps between images that it draws itself", True, 0, MAX_TRAINING_STEPS),
}


def overrides_of(recipe: Recipe, first: Any, second: Any, values: Sequence[Any]) -> list[str]:
    """Return the recipe overrides of the fields of the page.

    Args:
        recipe: whose warm-up is shortened where stage 2 is.
        first, second: steps of stage 1 and 2.
        values: one for each of VALUES, None to keep the recipe's.

    Raises:
        FormError: a value out of its bounds.
    """
    one = forms.integer("steps of stage 1", first, 1, MAX_TRAINING_STEPS)
    two = forms.integer("steps of stage 2", second, 1, MAX_TRAINING_STEPS)
    warmup = min(recipe.stage2.warmup_steps, two // 4)
    overrides = [f"stage1.max_steps={one}", f"stage2.max_steps={two}", f"stage2.warmup_steps={warmup}"]
    for (key, (title, is_integer, low, high)), value in zip(VALUES.items(), values, strict=True):
        if value is not None:
            checked = (
                forms.integer(title, value, int(low), int(high))
                if is_integer
                else forms.number(title, value, low, high)
            )
            overrides.append(f"{key}={checked!r}")
    return overrides


CURVES = (
    ("Stage 1: L1 (blue), alignment (orange)", ("L1", "alignment")),
    ("Stage 2: velocity error of base (blue) and detail (orange)", ("base", "detail")),
)
NEWEST = "Newest checkpoint"
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1}


class TrainTab:
    """Fields of the tab and what its buttons do.

    Args:
        trainings: those of the page.
        roots: data that is offered by name.
        uploads: folder of uploads.
    """

    def __init__(self, trainings: Trainings, roots: Roots, uploads: Path):
        self.trainings, self.roots, self.uploads = trainings, roots, uploads
        self.choices = upgrade_recipes()
        self._looking = threading.Lock()  # held by the visitor for whom images of a checkpoint are made
        gr.Markdown(
            "Runs `davae upgrade` on this machine, in a folder of its own. Without images of yours it trains on the "
            "recipe's. With `micro`, 100 steps of each stage take minutes; its full recipe takes hours."
        )
        self._add_form()
        self._add_buttons()
        self._add_progress()
        self._connect()

    def _add_form(self) -> None:
        steps: dict[str, Any] = {"precision": 0, "minimum": 1, "maximum": MAX_TRAINING_STEPS}
        with gr.Row():
            self.name = gr.Textbox(
                f"try-{time.strftime('%H%M%S')}", label="Name", elem_id="training-name", max_lines=1
            )
            self.recipe = gr.Dropdown(
                self.choices,
                value="micro",
                label="Recipe",
                allow_custom_value=True,  # a name that is not a choice gets a line, not an alert
                elem_id="recipe",
            )
            self.steps1 = gr.Number(100, label="Steps of stage 1", elem_id="steps-1", **steps)
            self.steps2 = gr.Number(100, label="Steps of stage 2", elem_id="steps-2", **steps)
        with gr.Row():
            self.folder = gr.Dropdown(
                self.roots.data_names(),
                value=RECIPES_OWN,
                label="Images: a folder or .tar below --data-root",
                allow_custom_value=True,
                elem_id="training-data",
            )
            self.files = gr.File(label="or upload images and .txt captions", file_count="multiple", height=170)
        with gr.Accordion("Other values; the recipe's own where a field is empty", open=False), gr.Row():
            self.values = [
                gr.Number(
                    None,
                    label=title,
                    precision=0 if is_integer else None,
                    minimum=low,
                    maximum=high,
                    elem_id=f"value-{key.replace('.', '-')}",
                )
                for key, (title, is_integer, low, high) in VALUES.items()
            ]

    def _add_buttons(self) -> None:
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="start-training")
            self.halt = gr.Button("Pause", elem_id="pause-training")
            self.again = gr.Button("Resume", elem_id="resume-training")
            self.old = gr.Dropdown([], value=None, label="An earlier training", allow_custom_value=False)
        self.state = gr.Markdown("Nothing started.", elem_id="training-state")
        self.unused = gr.Markdown(elem_id="training-unused")
        self.left_out = gr.Markdown(elem_id="training-left-out")
        self.link = gr.Markdown(elem_id="training-report")

    def _add_progress(self) -> None:
        """Add the plots and the images, which are hidden until there is a training."""
        with gr.Column(visible=False) as self.progress:
            with gr.Row():
                self.plots = [
                    gr.LinePlot(
                        x="step",
                        y="value",
                        color="curve",
                        label=label,
                        height=300,
                        elem_id=f"curve-{number}",
                        color_map=dict(zip(curves, COLOURS, strict=True)),
                    )
                    for number, (label, curves) in enumerate(CURVES)
                ]
            self.gallery = gr.Gallery(
                label=NEWEST,
                columns=4,
                height="auto",
                format="png",
                elem_classes=["small"],
                elem_id="checkpoint",
            )
        self.watched = gr.State("")  # the training that this visitor watches
        self.checkpoint = gr.State("")  # the one whose images are shown

    def _connect(self) -> None:
        watched, view = self.watched, self._view()
        self.start.click(
            as_user_error(self.begin),
            [self.name, self.recipe, self.folder, self.files, self.steps1, self.steps2, *self.values],
            [watched, self.unused],
            **PRIVATE,
            **ONE_AT_A_TIME,
        ).success(self.look, watched, view, **PRIVATE)
        self.halt.click(as_user_error(self.pause), watched, watched, **PRIVATE, **ONE_AT_A_TIME)
        self.again.click(as_user_error(self.resume), watched, watched, **PRIVATE, **ONE_AT_A_TIME)
        self.old.input(as_user_error(self.choose), self.old, [watched, self.checkpoint, self.unused], **PRIVATE).then(
            self.look, watched, view, **PRIVATE
        )
        gr.Timer(2).tick(as_user_error(self.look), watched, view, **QUIET)
        gr.Timer(5).tick(
            as_user_error(self.newest_images),
            [watched, self.checkpoint],
            [self.gallery, self.checkpoint],
            **QUIET,
        )

    def _view(self) -> list[Any]:
        return [self.watched, self.state, self.left_out, self.link, *self.plots, self.old, self.progress]

    # -- handlers ----------------------------------------------------------------------------------------------

    def begin(
        self, title: Any, which: Any, data: Any, sent: Any, first: Any, second: Any, *values: Any
    ) -> tuple[str, str]:
        """Start a training, and return its name and a line on the captions that it does not use."""
        title = forms.text("name", title, 200).strip()
        which = forms.one_of("recipe", forms.text("recipe", which, 200).strip(), self.choices)
        source = self.roots.data_source(RECIPES_OWN if data in (None, "") else data)
        paths = uploaded(forms.files("images", sent, 2 * MAX_IMAGES), self.uploads)
        recipe = load_recipe(which)
        assert isinstance(recipe, Recipe)
        overrides = overrides_of(recipe, first, second, values)
        self.trainings.start(title, which, data=source, uploads=paths or None, overrides=overrides)
        unused = unused_captions(paths)
        if not unused:
            return title, ""
        return title, f"Captions without an image of their name: {escape_markup(named(unused, len(unused)))}."

    def _known(self, title: Any) -> str:
        return forms.one_of("training", title, self.trainings.names())

    def resume(self, title: Any) -> str:
        """Go on with a training and return its name."""
        self.trainings.resume(self._known(title))
        return title

    def pause(self, title: Any) -> str:
        """Ask a training to save and stop, and return its name."""
        self.trainings.pause(self._known(title))
        return title

    def choose(self, title: Any) -> tuple[str, str, str]:
        """Return the name of an earlier training, and blanks for what was shown of another one."""
        return self._known(title), "", ""

    def look(self, title: str) -> list[Any]:
        """Return the state of a training: its line, images that it leaves out, report and curves."""
        names = gr.update(choices=self.trainings.names())
        title = title or self.trainings.current()  # one that another page started, or that outlived it
        if not title:
            return ["", "Nothing started.", "", "", None, None, names, gr.update(visible=False)]
        now = self.trainings.state(title)
        line = f"**{escape_markup(title)}** {escape_markup(forms.without_folders(now.line))}"
        reasons = [f"- {escape_markup(reason)}" for reason in self.trainings.left_out(title)]
        left_out = "\n".join(["Images that are not trained on:", "", *reasons]) if reasons else ""
        report = f"[Open the report](/reports/{title})" if now.finished else ""
        curves = [pd.DataFrame(rows) if rows else None for rows in self.trainings.curves(title).values()]
        return [title, line, left_out, report, *curves, names, gr.update(visible=True)]

    def newest_images(self, title: str, seen: str) -> list[Any]:
        """Return newer images than those seen and their name, to one visitor at a time."""
        newest = newest_images_of(self.trainings.folder(title)) if title else None
        if newest is None or newest.name == seen or not self._looking.acquire(blocking=False):
            return [gr.skip(), seen]
        try:
            shown, line = checkpoint_images(self.trainings.folder(title), newest), NEWEST
        except USERS as error:
            shown, line = [], f"{NEWEST}: {forms.line_of(error)}"
        finally:
            self._looking.release()
        return [gr.update(value=shown, label=line), newest.name]
