"""The tab Enlarge: an image of the visitor, enlarged by the upgraded model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from davae.app import enlarging, forms
from davae.app.about import CREDIT, EXAMPLE_IMAGES, example_image
from davae.app.pair import Pair
from davae.app.streaming import Report
from davae.app.turns import Turns
from davae.app.uploads import MAX_PROMPT, MAX_STEPS, read_upload, uploaded
from davae.app.widgets import (
    COMPUTE,
    NO_EXAMPLE,
    QUIET,
    comparison,
    example_choice,
    image_box,
    is_shown_step,
    previews_switch,
    stops,
    updates_of,
)
from davae.backbones.classes import goes_by_class
from davae.errors import DavaeError


class EnlargeTab:
    """Fields of the tab and what its buttons do.

    Args:
        pair: the models of the page.
        folder: of uploads.
        tab: that holds the fields; its example is shown when it is opened.
    """

    def __init__(self, pair: Pair, folder: Path, tab: gr.Tab):
        self.pair, self.folder, self.turns = pair, folder, Turns()
        if pair.upgraded is None:
            gr.Markdown("A base model is open; an upgraded one enlarges images: `davae app micro`.")
            return
        self.by_class = goes_by_class(pair.upgraded)
        with gr.Row():
            with gr.Column():
                self.file = gr.File(label="Drop an image", elem_id="enlarged-image", height=170)
                self.example = example_choice("enlarge-example")
            self._add_form()
        hint = f"Every side becomes {pair.scale} times as long. {CREDIT}"
        self.status = gr.Markdown(hint, elem_id="enlarge-status")
        with gr.Row():
            self.input = image_box(pair, "input", elem_id="enlarge-input", min_width=220)
            with gr.Column(scale=3):
                self.slider = comparison(pair, "bicubic | enlarged by the model", "enlarge-slider")
        self._connect(tab)

    def _add_form(self) -> None:
        with gr.Column(scale=2):
            self.prompt = gr.Textbox(
                "1" if self.by_class else "",
                label="Class" if self.by_class else "What it shows",
                elem_id="enlarge-prompt",
                max_length=MAX_PROMPT,
            )
            self.strength = gr.Slider(
                0, 1, 0, step=0.05, label="Strength: share of the steps that may change the image itself"
            )
            with gr.Row():
                self.steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps", elem_id="enlarge-steps")
                self.guidance = gr.Slider(0, 15, 1.0, step=0.1, label="Guidance")
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            self.previews = previews_switch("enlarge-previews")
            with gr.Row():
                self.start = gr.Button("Enlarge", variant="primary", elem_id="enlarge")
                self.halt = gr.Button("Stop", elem_id="stop-enlarging")

    def _connect(self, tab: gr.Tab) -> None:
        inputs = [
            self.file, self.prompt, self.strength, self.steps, self.guidance, self.seed, self.example, self.previews,
        ]  # fmt: skip
        outputs = [self.slider, self.status]
        self.start.click(self.enlarge, inputs, outputs, trigger_mode="always_last", **QUIET, **COMPUTE)
        stops(self.halt, self.turns, self.status)
        for event in (tab.select, self.file.change, self.example.change):
            event(self.show_input, [self.example, self.file], self.input, **QUIET)

    def _image(self, path: Any, example: Any) -> Image.Image | None:
        """Return the dropped image, else the chosen example."""
        paths = uploaded(forms.files("image", path, 1), self.folder)
        known = forms.one_of("example", example, [*EXAMPLE_IMAGES, NO_EXAMPLE])
        if paths:
            return read_upload(paths[0])
        return None if known == NO_EXAMPLE else example_image(known, self.pair.resolution // self.pair.scale)

    # -- handlers ----------------------------------------------------------------------------------------------

    def show_input(self, example: Any, path: Any) -> Image.Image | None:
        """Return the image that the button enlarges, None for one that cannot be read."""
        try:
            return self._image(path, example)
        except DavaeError:
            return None

    def enlarge(
        self, path: Any, words: Any, share: Any, count: Any, scale: Any, number: Any, example: Any, previews: Any,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Give bicubic enlargement, previews of the base, then the enlarged image."""

        def work(stop: threading.Event, report: Report) -> None:
            prompt = forms.text("class" if self.by_class else "prompt", words, MAX_PROMPT)
            options = {
                "strength": forms.number("strength", share, 0, 1),
                "steps": forms.integer("steps", count, 1, MAX_STEPS),
                "guidance": forms.number("guidance", scale, 0, 30),
                "seed": forms.integer("seed", number or 0, 0, 2**31 - 1),
            }
            shows = forms.flag("previews", previews)
            image = self._image(path, example)
            if image is None:
                report({self.status: "Drop an image first."})
                return
            done = enlarging.enlarge_image(
                self.pair,
                image,
                prompt,
                stop=stop,
                on_step=lambda step, total: self._report_step(report, step, total),
                on_preview=(lambda *both: report({self.slider: both})) if shows else None,
                **options,
            )
            report({self.slider: (done.before, done.after), self.status: done.note})

        yield from updates_of(work, request, self.turns, self.status, {self.slider: None})

    def _report_step(self, report: Report, done: int, total: int) -> None:
        if is_shown_step(done, total):
            report({self.status: f"Enlarging: step {done} of {total}."})
