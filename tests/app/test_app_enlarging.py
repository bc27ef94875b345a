"""The page's tab Enlarge: what it does, what it refuses, how it stops."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from upgraded_tiny import assembled

import davae
from davae.app.enlarging import enlarge_image
from davae.app.page import build, upload_folder
from davae.app.pair import Pair, Stopped
from davae.app.training import Trainings
from davae.errors import ModelError

OPTIONS = {"strength": 0.0, "steps": 2, "guidance": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def pair(tiny_base: Path) -> Pair:
    return Pair("tiny", None, assembled(tiny_base))


def test_an_image_is_enlarged_as_by_the_library(pair: Pair):
    image, steps = picture(1, 20, 14), []
    done = enlarge_image(
        pair, image, "a", stop=threading.Event(), on_step=lambda step, total: steps.append((step, total)), **OPTIONS
    )
    (same,) = davae.upscale(pair.upgraded, image, "a", steps=2, guidance_scale=1.0, batch_size=8)
    assert np.array_equal(np.asarray(done.after), np.asarray(same))
    assert (done.before.size, done.windows, steps[-1]) == ((40, 28), 2, (2, 2))
    assert done.note.startswith("40x28 pixels from 2 windows in ")


def test_it_stops_between_two_passes_and_refuses_what_takes_too_long(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    stop = threading.Event()
    with pytest.raises(Stopped):
        enlarge_image(
            pair, picture(1, 40, 40), "a", stop=stop, on_step=lambda *_: stop.set(), **{**OPTIONS, "steps": 9}
        )
    with pytest.raises(ModelError, match="600x600 pixels, 2500 windows"):
        enlarge_image(pair, Image.new("RGB", (600, 600)), "a", stop=threading.Event(), **OPTIONS)
    with pytest.raises(ModelError, match="open an upgraded one"):
        enlarge_image(Pair("base", pair.upgraded, None), picture(1), "a", stop=threading.Event(), **OPTIONS)
    monkeypatch.setattr("davae.app.enlarging.MAX_SECONDS", -1)
    with pytest.raises(ModelError, match="use fewer steps"):
        enlarge_image(pair, picture(1, 16, 16), "a", stop=threading.Event(), **OPTIONS)


def test_the_tab_s_handler_answers_in_one_line_or_with_two_images(pair: Pair, tmp_path: Path):
    page = build(pair, Trainings(tmp_path / "runs"))
    (handler,) = [fn for fn in page.fns.values() if fn.inputs and fn.inputs[0].elem_id == "enlarged-image"]
    upload = upload_folder() / "image.png"
    picture(1, 16, 16).save(upload)
    request = SimpleNamespace(session_hash="x", headers={})

    def call(*values) -> dict[str, object]:
        return {part.elem_id: value for answer in handler.fn(*values, request) for part, value in answer.items()}

    good = (str(upload), "a", 0, 2, 1.0, 0, "none", True)
    answer = call(*good)
    assert [image.size for image in answer["enlarge-slider"]] == [(32, 32), (32, 32)]
    for place, value, line in (
        (0, None, "Drop an image first"),
        (0, "/etc/passwd", "not"),
        (2, 1.5, "strength"),
        (3, 10**6, "steps"),
        (4, "x", "guidance"),
        (5, -1, "seed"),
        (1, "x" * 600, "prompt"),
    ):
        wrong = call(*(value if number == place else known for number, known in enumerate(good)))
        assert line in str(wrong["enlarge-status"])
        assert wrong["enlarge-slider"] is None
