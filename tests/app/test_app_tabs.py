"""The page's tabs without a browser: previews, one line of progress, examples, uploads that are not used."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs Gradio (davae[app])")

from conftest import picture
from test_app import pair  # noqa: F401 - a fixture
from test_app_attacks import handlers_of

from davae.app import about, checkpoint_images, drawing, enlarging
from davae.app.forms import FormError, flag
from davae.app.generate_tab import HINT, GenerateTab
from davae.app.page import build, upload_folder
from davae.app.pair import Pair, Stopped
from davae.app.streaming import streamed
from davae.app.training import Trainings
from davae.app.turns import Turns
from davae.app.uploads import named, unused_captions
from davae.recipes import dump_recipe, load_recipe

REQUEST = SimpleNamespace(session_hash="x", headers={})
OPTIONS: dict[str, Any] = {"seed": 3, "steps": 5, "guidance": 1.0}


@pytest.fixture(scope="module")
def page(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    return build(pair, Trainings(tmp_path_factory.mktemp("runs")))


def handler_of(page: Any, first: str) -> Any:
    """The handler whose first input has an id."""
    (found,) = [fn for fn in page.fns.values() if fn.inputs and fn.inputs[0].elem_id == first]
    return found


# -- reports of a computation ----------------------------------------------------------------------------------


def test_reports_come_while_the_work_goes_on_and_its_error_after_them():
    go = threading.Event()

    def work(report: Any) -> None:
        report(1)
        assert go.wait(10)
        report(2)
        raise ValueError("three")

    reports = streamed(work, threading.Event())
    assert next(reports) == 1  # the work waits for us
    go.set()
    assert next(reports) == 2
    with pytest.raises(ValueError, match="three"):
        next(reports)


def test_a_visitor_who_leaves_stops_the_work_without_waiting_for_it():
    stop, ended = threading.Event(), threading.Event()

    def work(report: Any) -> None:
        report(1)
        assert stop.wait(10)
        ended.set()

    reports = streamed(work, stop)
    next(reports)
    reports.close()
    assert stop.is_set()
    assert ended.wait(10)


# -- previews --------------------------------------------------------------------------------------------------


def test_previews_show_the_base_and_change_no_pixel(pair: Pair):  # noqa: F811
    seen: list[tuple[str, int, tuple[int, int]]] = []
    both = {}
    for name, on_preview in (
        ("with", lambda way, step, image: seen.append((way, step, image.size))),
        ("without", None),
    ):
        drawn = drawing.draw(pair, "x", drawing.WAYS, stop=threading.Event(), on_preview=on_preview, **OPTIONS)
        both[name] = {result.way: np.asarray(result.image) for result in drawn}
    assert seen == [("upgraded", 2, (16, 16)), ("upgraded", 4, (16, 16))]
    for way in drawing.WAYS:
        assert np.array_equal(both["with"][way], both["without"][way]), way


@pytest.mark.parametrize(("steps", "every"), [(1, 2), (3, 2), (16, 2), (30, 4), (150, 19)])
def test_a_drawing_has_few_previews(steps: int, every: int):
    assert drawing.preview_interval(steps) == every
    assert steps // every <= drawing.PREVIEWS


def test_previews_are_not_timed(pair: Pair, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    def slow(self: Any, *_: Any) -> list[Any]:
        time.sleep(0.5)
        return [picture(0, 16, 16)]

    monkeypatch.setattr(drawing.TimedPreview, "_show", slow)
    began = time.perf_counter()
    options = {"stop": threading.Event(), "on_preview": lambda *_: None, **OPTIONS}
    (drawn,) = drawing.draw(pair, "x", ["upgraded"], **options)
    assert time.perf_counter() - began - drawn.seconds >= 1.0  # two previews


def test_a_scheduler_whose_levels_are_not_known_ends_the_previews_alone(
    pair: Pair,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    from davae.errors import ModelError

    def fail(*_: Any) -> Any:
        raise ModelError("its noise levels are not known")

    monkeypatch.setattr("davae.sample.preview.clean_of", fail)
    seen: list[Any] = []
    options = {"stop": threading.Event(), "on_preview": lambda *found: seen.append(found), **OPTIONS}
    assert len(list(drawing.draw(pair, "x", ["upgraded"], **options))) == 1
    assert seen == []


def test_enlarging_shows_bicubic_first_then_the_base_while_it_changes(pair: Pair):  # noqa: F811
    image, results = picture(1, 24, 16), {}
    for strength, count in ((0.0, 1), (1.0, 3)):  # after steps 2 and 4 of 5
        seen: list[Any] = []
        options = {"strength": strength, "stop": threading.Event(), **OPTIONS}
        done = enlarging.enlarge_image(
            pair, image, "x", on_preview=lambda before, now, seen=seen: seen.append((before, now)), **options
        )
        assert len(seen) == count
        assert seen[0][0] is seen[0][1]
        assert {now.size for _, now in seen} == {(48, 32)} == {done.before.size}
        results[strength] = done.after
        again = enlarging.enlarge_image(pair, image, "x", **options)
        assert np.array_equal(np.asarray(again.after), np.asarray(done.after))
    assert not np.array_equal(np.asarray(results[0.0]), np.asarray(results[1.0]))


# -- the tab Generate ------------------------------------------------------------------------------------------


def draw_values(page: Any, **changes: Any) -> tuple[Any, list[Any]]:
    run = handler_of(page, "prompt")
    known = {part.elem_id or part.label: part.value for part in run.inputs}
    return run, list({**known, "steps": 5, **changes}.values())


def test_progress_is_one_line_and_finished_images_stay(page: Any):
    run, values = draw_values(page)
    assert run.show_progress == "hidden"
    updates = [{part.elem_id: value for part, value in update.items()} for update in run.fn(*values, REQUEST)]
    lines = [update["draw-status"] for update in updates if "draw-status" in update]
    assert lines[0] == "Waiting for the model."
    assert "Drawing **upgraded**: step 2 of 5." in lines
    assert lines[-1] == "Done."
    shown: dict[str, list[Any]] = {f"drawn-{number}": [] for number in range(3)}
    for update in updates[1:]:
        for name in shown.keys() & update.keys():
            shown[name].append(update[name])
    assert [len(images) for images in shown.values()] == [1, 1, 3]  # two previews of the upgrade, then its image
    assert all(image is not None for images in shown.values() for image in images)
    notes = [update["note-2"] for update in updates if update.get("note-2")]
    assert notes[:2] == ["preview after step 2: its base, 16 px", "preview after step 4: its base, 16 px"]
    assert "32 px · 16 tokens" in notes[2]


def test_one_switch_ends_the_previews(page: Any):
    run, values = draw_values(page, previews=False)
    notes = [
        str(value)
        for update in run.fn(*values, REQUEST)
        for part, value in update.items()
        if part.elem_id == "note-2"
    ]
    assert not [note for note in notes if "preview" in note]
    with pytest.raises(FormError, match="not a switch"):
        flag("previews", 1)


def test_a_stop_between_previews_ends_the_drawing(page: Any, pair: Pair):  # noqa: F811
    (end,) = handlers_of(page, "stop-drawing")
    run, values = draw_values(page, steps=150)
    answers: Iterator[Any] = run.fn(*values, REQUEST)
    lines = []
    for update in answers:
        found = {part.elem_id: value for part, value in update.items()}
        lines += [found["draw-status"]] if "draw-status" in found else []
        if str(found.get("note-2", "")).startswith("preview"):
            assert end.fn(REQUEST) == "Stopped."
    assert lines[-1] == "Stopped."
    assert len(pair.upgraded.transformer._forward_pre_hooks) == 0


# -- examples --------------------------------------------------------------------------------------------------


def test_the_page_opens_with_facts_and_examples(pair: Pair, page: Any):  # noqa: F811
    lead = next(block.value for block in page.blocks.values() if getattr(block, "elem_id", None) == "lead")
    for words in ("It draws 32 pixels with 16 tokens", "needs 64 tokens for 32 pixels", "takes prompts"):
        assert words in lead
    assert str(Path(pair.name).parent) not in lead
    prompts = about.example_prompts(pair)
    assert draw_values(page)[1][0] == prompts[0]
    examples = handler_of(page, "examples")
    assert [examples.fn(number) for number in range(len(prompts))] == prompts
    assert about.example_image("rose", 40).size == (40, 40)


def test_examples_of_an_embedded_model_and_of_a_folder_without_recipe(pair: Pair, tmp_path: Path):  # noqa: F811
    micro = Pair("micro-upgraded", pair.base, pair.upgraded)
    assert about.example_prompts(micro) == list(load_recipe("micro").sampling.prompts)[: about.FEW]
    assert "openmoji" in about.model_facts(micro)[-1]
    (tmp_path / "recipe.yaml").write_text("kind: nonsense")
    for name in (str(tmp_path), str(tmp_path / "absent"), "organisation/model"):
        assert about.example_prompts(Pair(name, pair.base, pair.upgraded)) == list(about.PROMPTS)
    assert "It is a base model that draws 16 pixels" in about.model_facts(Pair("base", pair.base, None))[0]


def test_the_first_drawing_is_made_once_and_gives_way(pair: Pair, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    example = drawing.ExampleDrawing(pair, "x")
    first = example.images(1.0)
    assert [result.way for result in first] == ["base, enlarged", "upgraded"]
    assert example.images(1.0) is first

    def wait(*_: Any, stop: threading.Event, **options: Any) -> Iterator[Any]:
        assert stop.wait(20)
        raise Stopped
        yield

    monkeypatch.setattr(drawing, "draw", wait)
    other = drawing.ExampleDrawing(pair, "x")
    threading.Timer(0.2, other.give_way).start()
    assert other.images(1.0) == []


def test_a_model_too_slow_for_the_first_drawing_is_tried_once(pair: Pair, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    passes: list[int] = []

    def slow(*_: Any, stop: threading.Event, on_step: Any, **options: Any) -> Iterator[Any]:
        for done in range(16):
            on_step("upgraded", done, 16)
            passes.append(done)
            if stop.is_set():
                raise Stopped
            time.sleep(0.05)
        yield

    monkeypatch.setattr(drawing, "draw", slow)
    monkeypatch.setattr(drawing.ExampleDrawing, "SECONDS", 0.1)
    example = drawing.ExampleDrawing(pair, "x")
    assert example.images(1.0) == []
    tried = len(passes)
    assert 1 < tried < 16
    assert example.images(1.0) == []
    assert len(passes) == tried


def test_a_visit_that_waits_does_not_begin_again_what_gave_way(pair: Pair, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    begun, drawings = threading.Event(), []

    def wait(*_: Any, stop: threading.Event, **options: Any) -> Iterator[Any]:
        drawings.append(stop)
        begun.set()
        assert stop.wait(20)
        raise Stopped
        yield

    monkeypatch.setattr(drawing, "draw", wait)
    example = drawing.ExampleDrawing(pair, "x")
    visits = [threading.Thread(target=example.images, args=(1.0,)) for _ in range(3)]
    for visit in visits:
        visit.start()
    assert begun.wait(10)
    while len(example._visits) < 3:
        time.sleep(0.01)
    example.give_way()  # another visitor draws
    for visit in visits:
        visit.join(10)
    assert len(drawings) == 1
    assert not example._visits


def test_no_first_drawing_begins_while_a_visitor_draws(pair: Pair):  # noqa: F811
    tab = SimpleNamespace(turns=Turns(), status="status", example=None)
    tab.turns.begin("one", 1)
    assert GenerateTab.show_example(tab) == {"status": HINT}  # type: ignore[arg-type]


def test_an_example_is_reconstructed_while_no_image_is_dropped(page: Any):
    encode = next(fn for fn in page.fns.values() if fn.inputs and fn.inputs[0].elem_id == "photo")
    values = [part.value for part in encode.inputs]
    answer = encode.fn(*values)
    assert answer[1].size == answer[3].size == (32, 32)
    assert answer[5].startswith("Example rose. PSNR against the original: upgraded ")
    assert encode.fn(*values[:-1], "none")[1:] == [None, None, None, None, "", None]


# -- uploads ---------------------------------------------------------------------------------------------------


def test_captions_without_an_image_are_named(page: Any, monkeypatch: pytest.MonkeyPatch):
    uploads = [Path("a.png"), Path("a.txt"), Path("b.txt"), Path("c\n.TXT")]
    assert unused_captions(uploads) == ["b.txt", "c?.TXT"]
    sent = [upload_folder() / name for name in ("a.png", "<b>.txt")]
    for path in sent:
        path.touch()
    monkeypatch.setattr(Trainings, "start", lambda *_, **options: None)
    begin = handler_of(page, "training-name")
    values = [part.value for part in begin.inputs]
    line = "Captions without an image of their name: &lt;b&gt;.txt."
    assert begin.fn("first", *values[1:3], [str(path) for path in sent], *values[4:]) == ("first", line)
    assert begin.fn("first", *values[1:]) == ("first", "")
    assert named([str(number) for number in range(7)], 7) == "0, 1, 2, 3, 4 and 2 more"


@pytest.fixture
def training(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A training with a checkpoint, and the handler that shows it; `drawn` has what was drawn, `take` how long it takes."""
    look = next(fn for fn in page.fns.values() if fn.outputs and fn.outputs[0].elem_id == "checkpoint")
    monkeypatch.setattr(look.fn.__wrapped__.__self__.trainings, "root", tmp_path)
    found = SimpleNamespace(folder=tmp_path / "first", look=look.fn, drawn=[], handler=look)
    found.take = lambda: None

    def draw(folder: Path, recipe: Any, state: str, base: Any, check: Any) -> list[Any]:
        found.take()
        check()
        found.drawn.append(state)
        return [(picture(0, 8, 8), state)]

    (found.folder / "checkpoints" / "stage1-00000010").mkdir(parents=True)
    (found.folder / "recipe.yaml").write_text(dump_recipe(load_recipe("micro")))
    monkeypatch.setattr(checkpoint_images, "load_checkpoint", lambda path: path.name)
    monkeypatch.setattr(checkpoint_images, "_load_base", lambda model: found.drawn.append("loaded"))
    monkeypatch.setattr(checkpoint_images, "_reconstructions", draw)
    return found


def test_images_of_a_checkpoint_are_made_once_for_all_visitors(training: SimpleNamespace):
    for _ in range(3):
        shown, seen = training.look("first", "")
        assert shown["value"][0][1] == seen == "stage1-00000010"
    assert training.drawn == ["loaded", "stage1-00000010"]
    assert training.handler.concurrency_id != "compute"  # drawings do not wait for those who watch
    (training.folder / "progress").mkdir()
    picture(0, 40, 20).save(training.folder / "progress" / "stage1-00000010.png")
    shown, seen = training.look("first", "stage1-00000010")
    assert (shown["value"][0][0].size, seen) == ((40, 20), "stage1-00000010.png")
    assert len(training.drawn) == 2


def test_the_page_loads_no_large_model_to_watch_a_training(
    training: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_images, "LARGEST", 1000)
    shown, seen = training.look("first", "")
    assert (shown["value"], training.drawn, seen) == ([], [], "stage1-00000010")
    assert "too large or too slow" in shown["label"]
    assert "run.sample_every" in shown["label"]


def test_images_that_take_too_long_are_not_tried_again(training: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_images, "SECONDS", 0.05)
    training.take = lambda: time.sleep(0.1)
    shown, _ = training.look("first", "")
    assert "take over" in shown["label"]
    (training.folder / "checkpoints" / "stage1-00000020").mkdir()
    shown, seen = training.look("first", "stage1-00000010")
    assert (training.drawn, seen) == (["loaded"], "stage1-00000020")
    assert "too slow" in shown["label"]


def test_images_that_a_training_leaves_out_are_named_on_the_page(page: Any, tmp_path: Path):
    trainings = Trainings(tmp_path)
    folder = tmp_path / "first"
    folder.mkdir()
    assert trainings.left_out("first") == []
    reasons = {"smaller than /srv/x": 5, "truncated": 1}
    names = {"smaller than /srv/x": ["000-a.png", "001-b.png", "002-c.png"], "truncated": ["003-d.png"]}
    (folder / "data.json").write_text(json.dumps({"left_out": reasons, "left_out_first": names}))
    assert trainings.left_out("first") == [
        "5 smaller than x: 000-a.png, 001-b.png, 002-c.png and 2 more",
        "1 truncated: 003-d.png",
    ]
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("micro")))
    look = next(fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "look")
    tab = look.fn.__wrapped__.__self__ if hasattr(look.fn, "__wrapped__") else look.fn.__self__
    before, tab.trainings = tab.trainings, trainings
    try:
        assert "- 1 truncated: 003\\-d.png" in look.fn("first")[2]
    finally:
        tab.trainings = before
