"""What the tab Enlarge shows and what its buttons do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from davae.app import enlarging, forms
from davae.app.pair import Pair, Stopped
from davae.app.tabs import COMPUTE, STOPPED, USERS, comparison, status_of, stops
from davae.app.turns import Turns, arrival_of
from davae.app.uploads import MAX_PROMPT, MAX_STEPS, read_upload, uploaded
from davae.backbones.classes import goes_by_class


def enlarge_tab(pair: Pair, folder: Path) -> None:
    """Add the fields and handlers of the tab.

    Args:
        pair: the models of the page.
        folder: of uploads.
    """
    if pair.upgraded is None:
        gr.Markdown("A base model is open; an upgraded one enlarges images: `davae app micro`.")
        return
    turns, by_class = Turns(), goes_by_class(pair.upgraded)
    with gr.Row():
        file = gr.File(label="Drop an image", elem_id="enlarged-image", height=170)
        with gr.Column():
            prompt = gr.Textbox(
                "1" if by_class else "",
                label="Class" if by_class else "What it shows",
                elem_id="enlarge-prompt",
                max_length=MAX_PROMPT,
            )
            strength = gr.Slider(
                0, 1, 0, step=0.05, label="Strength: share of the steps that may change the image itself"
            )
            with gr.Row():
                steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps", elem_id="enlarge-steps")
                guidance = gr.Slider(0, 15, 1.0, step=0.1, label="Guidance")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        with gr.Column(min_width=120):
            go = gr.Button("Enlarge", variant="primary", elem_id="enlarge")
            halt = gr.Button("Stop", elem_id="stop-enlarging")
    status = gr.Markdown(f"Every side becomes {pair.scale} times as long.", elem_id="enlarge-status")
    slider = comparison(pair, "bicubic | enlarged by the model", "enlarge-slider")

    def run(
        path: Any, words: Any, share: Any, count: Any, scale: Any, number: Any,
        request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008 - Gradio finds the bar by this default
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        visitor, arrival = str(request.session_hash), arrival_of(request)
        stop = turns.begin(visitor, arrival)
        yield {slider: None, status: "Waiting for the model."}
        try:
            words = forms.text("class" if by_class else "prompt", words, MAX_PROMPT)
            options = {
                "strength": forms.number("strength", share, 0, 1),
                "steps": forms.integer("steps", count, 1, MAX_STEPS),
                "guidance": forms.number("guidance", scale, 0, 30),
                "seed": forms.integer("seed", number or 0, 0, 2**31 - 1),
            }
            paths = uploaded(forms.files("image", path, 1), folder)
            if not paths:
                yield {status: "Drop an image first."}
                return
            done = enlarging.enlarge_image(
                pair,
                read_upload(paths[0]),
                words,
                stop=stop,
                on_step=lambda step, total: progress((step, total), desc="enlarging"),
                **options,
            )
        except Stopped:
            yield {status: STOPPED}
            return
        except USERS as error:
            yield {status: status_of(error)}
            return
        finally:
            turns.end(visitor, arrival)
        yield {slider: (done.before, done.after), status: done.note}

    inputs = [file, prompt, strength, steps, guidance, seed]
    go.click(run, inputs, [slider, status], trigger_mode="always_last", api_visibility="private", **COMPUTE)
    stops(halt, turns, status)
