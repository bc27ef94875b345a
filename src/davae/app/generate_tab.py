"""The tab Generate: one prompt drawn three ways, compared side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from davae.app import drawing, forms
from davae.app.about import example_prompts
from davae.app.forms import escape_markup
from davae.app.pair import Pair
from davae.app.streaming import Report
from davae.app.turns import Turns
from davae.app.uploads import MAX_PROMPT, MAX_STEPS
from davae.app.widgets import (
    COMPUTE,
    PRIVATE,
    QUIET,
    STATE_SECONDS,
    USERS,
    as_user_error,
    comparison,
    image_box,
    is_shown_step,
    previews_switch,
    status_of,
    stops,
    updates_of,
)
from davae.backbones.classes import goes_by_class
from davae.recipes.sections import Sampling

HINT = "Every image starts from the same noise. Times are of this machine, without the wait and the previews."
Images = dict[str, Image.Image]  # way -> image


class GenerateTab:
    """Fields of the tab and what its buttons do.

    Args:
        pair: the models of the page.
    """

    def __init__(self, pair: Pair):
        self.pair, self.turns = pair, Turns()
        self.ways = drawing.ways_of(pair)
        self.by_class = goes_by_class(pair.any)
        self.prompts = example_prompts(pair)
        self.example = drawing.ExampleDrawing(pair, self.prompts[0])
        self._add_form()
        self._add_images()
        self._add_comparison()
        self._connect()

    def _add_form(self) -> None:
        with gr.Row():
            self.prompt = gr.Textbox(
                self.prompts[0],
                label="Class, by name or number" if self.by_class else "Prompt",
                elem_id="prompt",
                max_lines=2,
                max_length=MAX_PROMPT,
                scale=3,
            )
            self.start = gr.Button("Draw", variant="primary", elem_id="draw", scale=1)
            self.halt = gr.Button("Stop", elem_id="stop-drawing", scale=1)
        self.examples = gr.Dataset(
            components=["textbox"],
            samples=[[prompt] for prompt in self.prompts],
            type="index",
            label="Examples",
            elem_id="examples",
        )
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            self.steps = gr.Slider(1, MAX_STEPS, 30, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(0, 15, Sampling().guidance_scale, step=0.1, label="Guidance")
            with gr.Column():
                self.chosen = gr.CheckboxGroup(self.ways, value=self.ways, label="Draw", elem_id="ways")
                self.previews = previews_switch("previews")

    def _add_images(self) -> None:
        self.status = gr.Markdown(HINT, elem_id="draw-status")
        self.images: dict[str, gr.Image] = {}
        self.notes: dict[str, gr.Markdown] = {}
        with gr.Row():
            for number, way in enumerate(self.ways):
                with gr.Column(min_width=220):
                    self.images[way] = image_box(self.pair, way, elem_id=f"drawn-{number}")
                    self.notes[way] = gr.Markdown(elem_id=f"note-{number}")
        self.drawn = gr.State({}, time_to_live=STATE_SECONDS)

    def _add_comparison(self) -> None:
        with gr.Row(visible=len(self.ways) > 1):
            self.left = gr.Dropdown(self.ways, value=self.ways[0], label="Left")
            self.right = gr.Dropdown(self.ways, value=self.ways[-1], label="Right")
        self.slider = comparison(self.pair, "Drag the line; the wheel zooms", "drawn-slider")
        gr.Markdown("The same place of each, enlarged: at first where left and right differ most.")
        with gr.Row():
            self.across = gr.Slider(0, 1, 0.5, step=0.01, label="Across", elem_id="across")
            self.down = gr.Slider(0, 1, 0.5, step=0.01, label="Down")
            self.zoom = gr.Slider(2, 8, 4, step=1, label="Zoom")
        with gr.Row():
            self.places = {way: image_box(self.pair, f"{way}: the place", height=240) for way in self.ways}

    def _connect(self) -> None:
        inputs = [
            self.prompt, self.seed, self.steps, self.guidance, self.chosen, self.left, self.right, self.zoom, self.previews,
        ]  # fmt: skip
        # A click while a stopped drawing ends is kept, not lost. Gradio's own `cancels` ends whatever runs when its
        # request arrives, a newer drawing too, and closes the stream by which the page gets its answers.
        gr.on(
            [self.start.click, self.prompt.submit],
            self.draw,
            inputs,
            self._outputs(),
            trigger_mode="always_last",
            **QUIET,
            **COMPUTE,
        )
        stops(self.halt, self.turns, self.status)
        self.examples.click(as_user_error(self.use_example), self.examples, self.prompt, **QUIET)
        for side in (self.left, self.right):
            side.change(as_user_error(self.compared), [self.drawn, self.left, self.right], self.slider, **PRIVATE)
        for control in (self.across, self.down, self.zoom):
            control.input(
                as_user_error(self.places_of),
                [self.drawn, self.across, self.down, self.zoom],
                list(self.places.values()),
                **QUIET,
            )

    def connect_visit(self, page: gr.Blocks) -> None:
        """Show the example drawing to each visitor who opens the page."""
        page.load(self.show_example, None, self._outputs(), concurrency_limit=None, **QUIET)

    def _outputs(self) -> list[Any]:
        several = (self.images, self.notes, self.places)
        return [
            self.drawn, self.slider, self.status, self.across, self.down,
            *(part for parts in several for part in parts.values()),
        ]  # fmt: skip

    # -- handlers ----------------------------------------------------------------------------------------------

    def draw(
        self, words: Any, number: Any, count: Any, scale: Any, chosen: Any, first: Any, second: Any, times: Any,
        previews: Any, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Give the images of a prompt as they are drawn, with previews of the upgraded one."""
        self.example.give_way()

        def work(stop: threading.Event, report: Report) -> None:
            ways = forms.some_of("ways", chosen, self.ways)
            zoom = forms.integer("zoom", times, 2, 8)
            for side in (first, second):
                forms.one_of("side", side, self.ways)
            found: Images = {}
            for result in drawing.draw(
                self.pair,
                forms.text("class" if self.by_class else "prompt", words, MAX_PROMPT),
                ways,
                seed=forms.integer("seed", number or 0, 0, 2**31 - 1),
                steps=forms.integer("steps", count, 1, MAX_STEPS),
                guidance=forms.number("guidance", scale, 0, 30),
                stop=stop,
                on_step=lambda way, done, total: self._report_step(report, way, done, total),
                on_preview=self._previewing(report) if forms.flag("previews", previews) else None,
            ):
                found[result.way] = result.image
                report({**self._shown(result), self.status: f"{len(found)} of {len(ways)} drawn."})
            report({**self._finished(found, first, second, zoom), self.status: "Done."})

        blank = {self.drawn: {}, self.slider: None, **dict.fromkeys(self.images.values())}
        blank |= dict.fromkeys(self.places.values()) | dict.fromkeys(self.notes.values(), "")
        yield from updates_of(work, request, self.turns, self.status, blank)

    def _report_step(self, report: Report, way: str, done: int, total: int) -> None:
        if is_shown_step(done, total):
            report({self.status: f"Drawing **{way}**: step {done} of {total}."})

    def _previewing(self, report: Report) -> drawing.OnPreview:
        def show(way: str, step: int, image: Image.Image) -> None:
            note = f"preview after step {step}: its base, {image.width} px"
            report({self.images[way]: image, self.notes[way]: note})

        return show

    def _shown(self, result: drawing.DrawnImage) -> dict[Any, Any]:
        return {self.images[result.way]: result.image, self.notes[result.way]: result.note}

    def _finished(self, found: Images, first: str, second: str, zoom: int) -> dict[Any, Any]:
        """Return the updates of the slider and the enlarged places."""
        both = self.compared(found, first, second)
        x, y = drawing.most_different_place(*both, zoom) if both else (0.5, 0.5)
        places = dict(zip(self.places.values(), self.places_of(found, x, y, zoom), strict=True))
        return {self.drawn: found, self.slider: both, self.across: round(x, 2), self.down: round(y, 2), **places}

    def show_example(self) -> dict[Any, Any]:
        """Return the example drawing, nothing where a visitor draws already."""
        try:
            results = [] if self.turns.busy else self.example.images(Sampling().guidance_scale)
        except USERS as error:
            return {self.status: status_of(error)}
        if not results:
            return {self.status: HINT}
        found = {result.way: result.image for result in results}
        updates = self._finished(found, results[0].way, results[-1].way, 4)
        for result in results:
            updates |= self._shown(result)
        for way in self.ways:
            if way not in found:
                updates[self.notes[way]] = "not part of the example; Draw adds it"
        words = escape_markup(self.prompts[0])
        return {**updates, self.status: f"An example, *{words}* in {self.example.STEPS} steps. {HINT}"}

    def use_example(self, number: Any) -> str:
        """Return the example prompt of a number, counted from 0."""
        return self.prompts[forms.integer("example", number, 0, len(self.prompts) - 1)]

    def compared(self, found: Images, first: Any, second: Any) -> tuple[Image.Image, Image.Image] | None:
        """Return the two chosen images, None where one of them is not drawn."""
        left, right = (forms.one_of("side", side, self.ways) for side in (first, second))
        return (found[left], found[right]) if {left, right} <= found.keys() else None

    def places_of(self, found: Images, x: Any, y: Any, times: Any) -> list[Image.Image | None]:
        """Return the same place of each image, enlarged."""
        x, y = forms.number("across", x, 0, 1), forms.number("down", y, 0, 1)
        zoom = forms.integer("zoom", times, 2, 8)
        return [drawing.cut_place(found[way], x, y, zoom) if way in found else None for way in self.places]
