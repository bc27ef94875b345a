"""The tab Reconstruct: an image through both autoencoders, its detail channels faded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from davae.app import forms, reconstructing
from davae.app.about import CREDIT, EXAMPLE_IMAGES, example_image
from davae.app.forms import escape_markup
from davae.app.pair import Pair
from davae.app.reconstructing import Encoded
from davae.app.roots import label
from davae.app.uploads import read_upload, shown_name, uploaded
from davae.app.widgets import (
    COMPUTE,
    NO_EXAMPLE,
    PRIVATE,
    QUIET,
    STATE_SECONDS,
    USERS,
    as_user_error,
    comparison,
    example_choice,
    image_box,
    status_of,
)


class ReconstructTab:
    """Fields of the tab and what its buttons do.

    Args:
        pair: the models of the page.
        folder: of uploads.
        tab: that holds the fields; its example is encoded when it is opened.
    """

    def __init__(self, pair: Pair, folder: Path, tab: gr.Tab):
        self.pair, self.folder = pair, folder
        if pair.upgraded is None:
            name = escape_markup(label(pair.name))
            gr.Markdown(f"{name} has no detail channels; open an upgraded model to see what they add.")
            return
        self.channels = pair.upgraded.vae.layout.detail_channels
        self.sizes = [pair.resolution, 2 * pair.resolution]
        self._add_form()
        self._add_images()
        self._connect(tab)

    def _add_form(self) -> None:
        with gr.Row():
            with gr.Column():
                self.file = gr.File(label="Drop an image", elem_id="photo", height=170)
                self.example = example_choice("photo-example")
            with gr.Column():
                self.size = gr.Radio(self.sizes, value=self.pair.resolution, label="Pixels (centre square)")
                self.strength = gr.Slider(
                    0, 1.5, 1, step=0.05, label="Strength of the detail channels", elem_id="strength"
                )
                with gr.Row():
                    self.first = gr.Slider(1, self.channels, 1, step=1, label="First channel")
                    self.last = gr.Slider(1, self.channels, self.channels, step=1, label="Last channel")
        self.note = gr.Markdown(elem_id="reconstruction-note")
        self.encoded = gr.State(None, time_to_live=STATE_SECONDS)

    def _add_images(self) -> None:
        with gr.Row():
            self.original = image_box(self.pair, "original")
            self.base = image_box(self.pair, "base + bicubic", visible=self.pair.base is not None)
            self.upgraded = image_box(self.pair, "upgraded", elem_id="reconstructed")
            self.error = image_box(self.pair, "error")
        gr.Markdown(
            "Error: mean over the colours, of the upgraded image; brightest at "
            f"{reconstructing.ERROR_SHOWN:.0%} or more. {CREDIT}"
        )
        self.slider = comparison(self.pair, "base + bicubic | upgraded", "reconstruction-slider")

    def _connect(self, tab: gr.Tab) -> None:
        sliders = [self.strength, self.first, self.last]
        faded = [self.upgraded, self.error, self.note, self.slider]
        inputs = [self.file, self.size, *sliders, self.example]
        outputs = [self.encoded, self.original, self.base, *faded]
        for event in (self.file.change, self.size.change, self.example.change):
            event(self.encode, inputs, outputs, **PRIVATE, **COMPUTE)
        tab.select(self.encode_first, [self.encoded, *inputs], outputs, **QUIET, **COMPUTE)
        for part in sliders:
            part.change(
                as_user_error(self.fade),
                [self.encoded, *sliders],
                faded,
                trigger_mode="always_last",
                **QUIET,
                **COMPUTE,
            )

    # -- handlers ----------------------------------------------------------------------------------------------

    def encode_first(self, kept: Encoded | None, *values: Any) -> list[Any]:
        """Encode the image where none was encoded yet."""
        return self.encode(*values) if kept is None else [gr.skip()] * 7

    def encode(self, path: Any, pixels: Any, weight: Any, low: Any, high: Any, example: Any) -> list[Any]:
        """Return the latents of the dropped image, or of the example, and what they decode to."""
        try:
            paths = uploaded(forms.files("photo", path, 1), self.folder)
            known = forms.one_of("example", example, [*EXAMPLE_IMAGES, NO_EXAMPLE])
            size = forms.one_of("pixels", pixels, self.sizes)
            if not paths and known == NO_EXAMPLE:
                return [None, None, None, None, None, "", None]
            image = read_upload(paths[0]) if paths else example_image(known, self.sizes[-1])
            kept = reconstructing.encode(self.pair, image, size)
            upgraded, error, text, both = self.fade(kept, weight, low, high)
            name = escape_markup(shown_name(paths[0])) if paths else f"Example {known}"
            return [kept, kept.original, kept.base, upgraded, error, f"{name}. {text}", both]
        except USERS as problem:
            return [None, None, None, None, None, status_of(problem), None]

    def fade(self, kept: Encoded | None, weight: Any, low: Any, high: Any) -> list[Any]:
        """Return the image, error, note and slider for some strength of some detail channels."""
        weight = forms.number("strength", weight, 0, 1.5)
        ends = [forms.integer("channel", end, 1, self.channels) for end in (low, high)]
        if kept is None:
            return [None, None, "", None]
        weights = reconstructing.weights_of(self.channels, weight, *ends)
        image = reconstructing.decode_weighted(self.pair, kept, weights)
        text = f"PSNR against the original: upgraded {reconstructing.psnr_of(kept.original, image):.2f} dB"
        if kept.base is not None:
            text += f", base + bicubic {reconstructing.psnr_of(kept.original, kept.base):.2f} dB"
        return [image, reconstructing.error_map(kept.original, image), text, (kept.base or kept.original, image)]
