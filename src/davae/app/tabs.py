"""What the tabs Generate, Reconstruct and Inspect show and what their buttons do. One function a tab."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from davae.app import drawing, forms, reconstructing
from davae.app.forms import escape_markup, line_of
from davae.app.inspection import inspection
from davae.app.pair import Pair, Stopped
from davae.app.roots import Roots, label
from davae.app.turns import Turns, arrival_of
from davae.app.uploads import MAX_PROMPT, MAX_STEPS, read_upload, uploaded
from davae.errors import DavaeError
from davae.recipes.sections import Sampling
from davae.sample.class_conditional import ClassConditionalPipeline

COMPUTE: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1}  # events that hold the models
USERS = (DavaeError, torch.OutOfMemoryError)
STATE_SECONDS = 1800  # that a visitor's images are kept after the page was closed
SCALES = [2, 4, 8]
MAX_RESOLUTION = 16384
STOPPED = "Stopped."
SMALL = 300  # pixels, below which a picture is shown enlarged


def status_of(error: Exception) -> str:
    """Return an error's line for a field that shows Markdown."""
    return escape_markup(line_of(error))


def _picture(pair: Pair, label: str, **options: Any) -> gr.Image:
    classes = ["picture", "small"] if pair.resolution < SMALL else ["picture"]
    return gr.Image(
        label=label,
        interactive=False,
        elem_classes=classes,
        format="png",
        height=330,
        buttons=["download", "fullscreen"],
        **options,
    )


def stops(button: gr.Button, turns: Turns, status: gr.Markdown) -> None:
    """Let a button stop the drawings that its visitor asked for before."""

    def end(request: gr.Request) -> Any:
        last = turns.stop(str(request.session_hash), arrival_of(request))
        return STOPPED if last else gr.skip()

    button.click(end, None, status, api_visibility="private", concurrency_limit=None)


def comparison(pair: Pair, label: str, elem_id: str) -> gr.ImageSlider:
    classes = ["picture", "small"] if pair.resolution < SMALL else ["picture"]
    return gr.ImageSlider(label=label, format="png", height=460, type="pil", elem_id=elem_id, elem_classes=classes)


def as_user_error(function: Callable) -> Callable:
    """Wrap a handler: errors that are a visitor's to mend become one line on the page."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except USERS as error:
            line = html.escape(line_of(error))
            raise gr.Error(line, duration=None, title="Not done", print_exception=False) from error

    return wrapped


# -- generate --------------------------------------------------------------------------------------------------


def generate_tab(pair: Pair) -> None:
    turns = Turns()
    ways = drawing.ways_of(pair)
    by_class = isinstance(pair.any, ClassConditionalPipeline)

    with gr.Row():
        if by_class and pair.any.class_names:
            prompt = gr.Dropdown(pair.any.class_names, label="Class", elem_id="prompt", scale=3)
        else:
            prompt = gr.Textbox(
                "1" if by_class else "a red rose",
                label="Class number" if by_class else "Prompt",
                elem_id="prompt",
                max_lines=2,
                max_length=MAX_PROMPT,
                scale=3,
            )
        draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=1)
        halt = gr.Button("Stop", elem_id="stop-drawing", scale=1)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        steps = gr.Slider(1, MAX_STEPS, 30, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(0, 15, Sampling().guidance_scale, step=0.1, label="Guidance")
        wanted = gr.CheckboxGroup(ways, value=ways, label="Draw", elem_id="ways")
    status = gr.Markdown(
        "Every picture starts from the same noise. Times are of this machine, without the wait.",
        elem_id="draw-status",
    )
    pictures, notes = {}, {}
    with gr.Row():
        for number, way in enumerate(ways):
            with gr.Column(min_width=220):
                pictures[way] = _picture(pair, way, elem_id=f"drawn-{number}")
                notes[way] = gr.Markdown(elem_id=f"note-{number}")
    drawn = gr.State({}, time_to_live=STATE_SECONDS)
    with gr.Row(visible=len(ways) > 1):
        left = gr.Dropdown(ways, value=ways[0], label="Left")
        right = gr.Dropdown(ways, value=ways[-1], label="Right")
    slider = comparison(pair, "Drag the line between the two; the wheel zooms", "drawn-slider")
    gr.Markdown("The same place of each, enlarged: at first where left and right differ most.")
    with gr.Row():
        across = gr.Slider(0, 1, 0.5, step=0.01, label="Across", elem_id="across")
        down = gr.Slider(0, 1, 0.5, step=0.01, label="Down")
        zoom = gr.Slider(2, 8, 4, step=1, label="Zoom")
    with gr.Row():
        details = {way: _picture(pair, f"{way}: the place") for way in ways}

    def two(found: dict[str, Any], first: Any, second: Any) -> Any:
        sides = [forms.one_of("side", side, ways) for side in (first, second)]
        return tuple(found[side] for side in sides) if set(sides) <= found.keys() else None

    def run(
        words: Any, number: Any, count: Any, scale: Any, chosen: Any, first: Any, second: Any, times: Any,
        request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008 - Gradio finds the bar by this default
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        visitor, arrival = str(request.session_hash), arrival_of(request)
        stop = turns.begin(visitor, arrival)
        found: dict[str, Any] = {}
        yield {
            drawn: {},
            slider: None,
            status: "Waiting for the model.",
            **dict.fromkeys(pictures.values()),
        } | dict.fromkeys(notes.values(), "")
        try:
            chosen = forms.some_of("ways", chosen, ways)
            times = forms.integer("zoom", times, 2, 8)
            for side in (first, second):
                forms.one_of("side", side, ways)
            for result in drawing.draw(
                pair,
                forms.text("class" if by_class else "prompt", words, MAX_PROMPT),
                chosen,
                seed=forms.integer("seed", number or 0, 0, 2**31 - 1),
                steps=forms.integer("steps", count, 1, MAX_STEPS),
                guidance=forms.number("guidance", scale, 0, 30),
                stop=stop,
                on_step=lambda way, done, total: progress((done, total), desc=way),
            ):
                found[result.way] = result.picture
                yield {
                    pictures[result.way]: result.picture,
                    notes[result.way]: result.note,
                    status: f"{len(found)} of {len(chosen)} drawn.",
                }
        except Stopped:
            yield {status: STOPPED}
            return
        except USERS as error:
            yield {status: status_of(error)}
            return
        finally:
            turns.end(visitor, arrival)
        pictured = two(found, first, second)
        x, y = drawing.place(pictured[0], pictured[1], times) if pictured else (0.5, 0.5)
        places = dict(zip(details.values(), places_of(found, x, y, times), strict=True))
        yield {drawn: found, slider: pictured, status: "Done.", across: round(x, 2), down: round(y, 2), **places}

    def places_of(found: dict[str, Any], x: Any, y: Any, times: Any) -> list[Any]:
        x, y = forms.number("across", x, 0, 1), forms.number("down", y, 0, 1)
        times = forms.integer("zoom", times, 2, 8)
        return [drawing.cut(found[way], x, y, times) if way in found else None for way in details]

    outputs = [drawn, slider, status, across, down, *pictures.values(), *notes.values(), *details.values()]
    inputs = [prompt, seed, steps, guidance, wanted, left, right, zoom]
    triggers = [draw.click, *([prompt.submit] if isinstance(prompt, gr.Textbox) else [])]
    # A click while a stopped drawing ends is kept, not lost. Gradio's own `cancels` ends whatever runs when its request
    # arrives, a newer drawing too, and closes the stream by which the page gets its answers.
    gr.on(triggers, run, inputs, outputs, trigger_mode="always_last", api_visibility="private", **COMPUTE)
    stops(halt, turns, status)
    for side in (left, right):
        side.change(as_user_error(two), [drawn, left, right], slider, api_visibility="private")
    for control in (across, down, zoom):
        control.input(
            as_user_error(places_of),
            [drawn, across, down, zoom],
            list(details.values()),
            api_visibility="private",
            show_progress="hidden",
        )


# -- reconstruct -----------------------------------------------------------------------------------------------


def reconstruct_tab(pair: Pair, folder: Path) -> None:
    if pair.upgraded is None:
        gr.Markdown(
            f"{escape_markup(label(pair.name))} has no detail channels; open an upgraded model to see what they add."
        )
        return
    channels = pair.upgraded.vae.layout.detail_channels
    sizes = [pair.resolution, 2 * pair.resolution]
    with gr.Row():
        file = gr.File(label="Drop a photo", elem_id="photo", height=170)
        with gr.Column():
            size = gr.Radio(sizes, value=pair.resolution, label="Pixels (centre square)")
            strength = gr.Slider(0, 1.5, 1, step=0.05, label="Strength of the detail channels", elem_id="strength")
            with gr.Row():
                first = gr.Slider(1, channels, 1, step=1, label="First channel")
                last = gr.Slider(1, channels, channels, step=1, label="Last channel")
    note = gr.Markdown(elem_id="reconstruction-note")
    encoded = gr.State(None, time_to_live=STATE_SECONDS)
    with gr.Row():
        original = _picture(pair, "original")
        small = _picture(pair, "base + bicubic", visible=pair.base is not None)
        upgraded = _picture(pair, "upgraded", elem_id="reconstructed")
        error = _picture(pair, "error")
    gr.Markdown(
        f"Error: mean over the colours, of the upgraded picture; white is {reconstructing.ERROR_SHOWN:.0%} or more."
    )
    slider = comparison(pair, "base + bicubic | upgraded", "reconstruction-slider")

    def fade(kept: reconstructing.Encoded | None, weight: Any, low: Any, high: Any) -> list[Any]:
        weight = forms.number("strength", weight, 0, 1.5)
        ends = [forms.integer("channel", end, 1, channels) for end in (low, high)]
        if kept is None:
            return [None, None, "", None]
        weights = reconstructing.weights_of(channels, weight, *ends)
        picture = reconstructing.decode_weighted(pair, kept, weights)
        text = f"PSNR against the original: upgraded {reconstructing.psnr_of(kept.original, picture):.2f} dB"
        if kept.base is not None:
            text += f", base + bicubic {reconstructing.psnr_of(kept.original, kept.base):.2f} dB"
        return [
            picture,
            reconstructing.error_map(kept.original, picture),
            text,
            (kept.base or kept.original, picture),
        ]

    def encode(path: Any, pixels: Any, weight: Any, low: Any, high: Any) -> list[Any]:
        try:
            paths = uploaded(forms.files("photo", path, 1), folder)
            if not paths:
                return [None, None, None, None, None, "", None]
            kept = reconstructing.encode(pair, read_upload(paths[0]), forms.one_of("pixels", pixels, sizes))
            return [kept, kept.original, kept.base, *fade(kept, weight, low, high)]
        except USERS as error:
            return [None, None, None, None, None, status_of(error), None]

    shown = [upgraded, error, note, slider]
    sliders = [strength, first, last]
    for event in (file.change, size.change):
        event(
            encode,
            [file, size, *sliders],
            [encoded, original, small, *shown],
            api_visibility="private",
            **COMPUTE,
        )
    for part in sliders:
        part.change(
            as_user_error(fade),
            [encoded, *sliders],
            shown,
            api_visibility="private",
            trigger_mode="always_last",
            show_progress="hidden",
            **COMPUTE,
        )


# -- inspect ---------------------------------------------------------------------------------------------------


def inspect_tab(roots: Roots) -> None:
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
            128, label="Pixels of the upgraded picture", precision=0, minimum=1, maximum=MAX_RESOLUTION
        )
        scale = gr.Dropdown(SCALES, value=2, label="Scale")
        button = gr.Button("Inspect", variant="primary", elem_id="inspect")
    bound = gr.Markdown(elem_id="bound")
    table = gr.Dataframe(headers=["", "value"], interactive=False, elem_id="inspection")

    def run(source: Any, pixels: Any, times: Any) -> tuple[str, list[list[str]]]:
        try:
            rows, line = inspection(
                roots.model_source(forms.text("model", source, 200).strip()),
                forms.integer("pixels", pixels, 1, MAX_RESOLUTION),
                forms.one_of("scale", times, SCALES),
            )
        except USERS as error:
            return status_of(error), []
        return line, rows

    button.click(run, [model, resolution, scale], [bound, table], api_visibility="private", **COMPUTE)
