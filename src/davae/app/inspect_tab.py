"""The tab Inspect: the table of `davae inspect` for a model that is offered by name."""

from __future__ import annotations

from typing import Any

import gradio as gr

from davae.app import forms
from davae.app.inspection import inspection
from davae.app.roots import Roots
from davae.app.widgets import COMPUTE, PRIVATE, USERS, status_of

SCALES = [2, 4, 8]
MAX_RESOLUTION = 16384


class InspectTab:
    """Fields of the tab and what its button does.

    Args:
        roots: models that are offered.
    """

    def __init__(self, roots: Roots):
        self.roots = roots
        names = roots.model_names()
        with gr.Row():
            model = gr.Dropdown(
                names,
                value=names[0],
                label="Base model: micro, a preset, or one below --models-root",
                allow_custom_value=True,  # a name that is not a choice gets a line, not an alert
                elem_id="inspected",
                scale=3,
            )
            resolution = gr.Number(
                128, label="Pixels of the upgraded image", precision=0, minimum=1, maximum=MAX_RESOLUTION
            )
            scale = gr.Dropdown(SCALES, value=2, label="Scale")
            button = gr.Button("Inspect", variant="primary", elem_id="inspect")
        hint = "Tokens, parameters, compute and memory of an upgrade, before anything is trained."
        bound = gr.Markdown(hint, elem_id="bound")
        table = gr.Dataframe(headers=["", "value"], interactive=False, elem_id="inspection", visible=False)
        button.click(self.inspect, [model, resolution, scale], [bound, table], **PRIVATE, **COMPUTE)

    def inspect(self, source: Any, pixels: Any, times: Any) -> tuple[str, Any]:
        """Return the line with the bound, and the rows of the table."""
        try:
            rows, line = inspection(
                self.roots.model_source(forms.text("model", source, 200).strip()),
                forms.integer("pixels", pixels, 1, MAX_RESOLUTION),
                forms.one_of("scale", times, SCALES),
            )
        except USERS as error:
            return status_of(error), gr.update(value=[], visible=False)
        return line, gr.update(value=rows, visible=True)
