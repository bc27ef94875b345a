"""Fields and handlers that several tabs share."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from davae.app.about import EXAMPLE_IMAGES
from davae.app.forms import escape_markup, line_of
from davae.app.pair import Pair, Stopped
from davae.app.streaming import Report, streamed
from davae.app.turns import Turns, arrival_of
from davae.errors import DavaeError

COMPUTE: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1}  # events that hold the models
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# Gradio's own bar covers every output of a handler, finished images too: the status line shows the steps instead.
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
USERS = (DavaeError, torch.OutOfMemoryError)
STATE_SECONDS = 1800  # that a visitor's images are kept after the page was closed
WAITING, STOPPED = "Waiting for the model.", "Stopped."
SMALL = 300  # pixels, below which an image is shown enlarged
SHOWN_STEPS = 20  # of a drawing that the status line names
NO_EXAMPLE = "none"


def status_of(error: Exception) -> str:
    """Return an error's line for a field that shows Markdown."""
    return escape_markup(line_of(error))


def as_user_error(function: Callable) -> Callable:
    """Wrap a handler: an error that a visitor can mend becomes one line on the page."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except USERS as error:
            line = html.escape(line_of(error))
            raise gr.Error(line, duration=None, title="Not done", print_exception=False) from error

    return wrapped


def image_classes(pair: Pair) -> list[str]:
    """Return the CSS classes of an image: small ones are enlarged without smoothing."""
    return ["framed", "small"] if pair.resolution < SMALL else ["framed"]


def image_box(pair: Pair, label: str, **options: Any) -> gr.Image:
    """Add a field that shows an image.

    Args:
        pair: the models, whose size decides how it is shown.
        label: above the image.
        options: of `gr.Image`.
    """
    return gr.Image(
        label=label,
        interactive=False,
        elem_classes=image_classes(pair),
        format="png",
        height=options.pop("height", 330),
        buttons=["download", "fullscreen"],
        **options,
    )


def comparison(pair: Pair, label: str, elem_id: str) -> gr.ImageSlider:
    """Add a slider between two images.

    Args:
        pair: the models, whose size decides how it is shown.
        label: above the images.
        elem_id: id of the element.
    """
    return gr.ImageSlider(
        label=label, format="png", height=460, type="pil", elem_id=elem_id, elem_classes=image_classes(pair)
    )


def previews_switch(elem_id: str) -> gr.Checkbox:
    """Add the switch of the previews."""
    return gr.Checkbox(True, label="Previews while it draws", elem_id=elem_id)


def example_choice(elem_id: str) -> gr.Radio:
    """Add the choice of the image that is used while none is dropped."""
    names = list(EXAMPLE_IMAGES)
    return gr.Radio([*names, NO_EXAMPLE], value=names[0], label="Example, while no image is dropped", elem_id=elem_id)


def stops(button: gr.Button, turns: Turns, status: gr.Markdown) -> None:
    """Let a button stop the drawings that its visitor started before.

    Args:
        button: to press.
        turns: the drawings of the tab.
        status: shows that it was done.
    """

    def end(request: gr.Request) -> Any:
        last = turns.stop(str(request.session_hash), arrival_of(request))
        return STOPPED if last else gr.skip()

    button.click(end, None, status, concurrency_limit=None, **QUIET)


def updates_of(
    work: Callable[[threading.Event, Report], None],
    request: gr.Request,
    turns: Turns,
    status: gr.Markdown,
    cleared: dict[Any, Any],
) -> Iterator[dict[Any, Any]]:
    """Give the updates of fields that a drawing reports, until it is done, stopped or refused.

    Args:
        work: draws; it gets the event that stops it, and a function that takes updates.
        request: of the visitor.
        turns: the drawings of the tab.
        status: shows how the drawing ended where it gave no images.
        cleared: fields to empty at first.
    """
    visitor, arrival = str(request.session_hash), arrival_of(request)
    stop = turns.begin(visitor, arrival)
    yield {**cleared, status: WAITING}
    try:
        for update in streamed(functools.partial(work, stop), stop):
            if stop.is_set():  # the drawing may be ahead of what was shown
                raise Stopped
            yield update
    except Stopped:
        yield {status: STOPPED}
    except USERS as error:
        yield {status: status_of(error)}
    finally:
        turns.end(visitor, arrival)


def is_shown_step(done: int, total: int) -> bool:
    """Return whether the status line names a step: about SHOWN_STEPS of a drawing."""
    return done % -(-total // SHOWN_STEPS) == 0
