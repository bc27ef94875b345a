"""Uploads are decoded in a child process: what a decoder does to it costs one line."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from davae.app import decoding
from davae.app.decoding import decode_apart
from davae.app.uploads import read_upload, shown_name, uploaded
from davae.data.decoding import decode_image
from davae.errors import DataError, UnreadableImage


def png(width: int = 50, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    picture(1, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_same_pixels_as_in_this_process():
    apart = decode_apart(png(), 100, 10_000)
    assert np.array_equal(np.asarray(apart), np.asarray(decode_image(io.BytesIO(png()))))


def loop(*_: object) -> None:
    while True:
        time.sleep(0.01)


def fill(*_: object) -> None:
    kept = []
    while True:
        kept.append(bytearray(2**26))


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (loop, "too slow"),
        (lambda *_: os._exit(3), "damaged"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "damaged"),
        (fill, "too large"),
    ],
)
def test_a_decoder_that_loops_or_dies_costs_one_line(does, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "header_size", does)  # the child is a copy of this process
    monkeypatch.setattr(decoding, "SECONDS", 1 if does is loop else 20)
    monkeypatch.setattr(decoding, "MEMORY", 2**28)
    with pytest.raises(UnreadableImage, match=kind):
        decode_apart(png(), 100, 10_000)
    monkeypatch.undo()
    assert decode_apart(png(), 100, 10_000).size == (50, 40)


def test_sizes_are_refused_from_the_header():
    for side, pixels in ((49, 10_000), (100, 1_999)):
        with pytest.raises(UnreadableImage, match="too large: 50x40"):
            decode_apart(png(), side, pixels)


def test_a_program_named_as_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "cat.png"
    program.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a program was started"))
    with pytest.raises(DataError, match=r"cat\.png: not an image that davae reads"):
        read_upload(program)


def test_names_of_uploads_are_shown_short_and_files_of_others_not_at_all(tmp_path: Path):
    assert shown_name(Path("a/b\n\u202ec.png")) == "b??c.png"
    assert len(shown_name(Path("x" * 200))) == 80
    (tmp_path / "mine.png").write_bytes(png())
    assert uploaded([str(tmp_path / "mine.png")], tmp_path) == [tmp_path / "mine.png"]
    for other in ("/etc/passwd", str(tmp_path), "mine.png", f"{tmp_path}/../x", ""):
        with pytest.raises(DataError, match="was not uploaded here") as refused:
            uploaded([other], tmp_path)
        assert not other or other not in str(refused.value)
    with pytest.raises(DataError, match=r"absent\.png cannot be read") as absent:
        read_upload(tmp_path / "absent.png")
    assert str(tmp_path) not in str(absent.value)
