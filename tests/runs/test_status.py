"""What a run shows of itself: the header before it begins, the time left, its state, its log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from davae.cli import app
from davae.commands import header
from davae.commands.verbosity import LOG, run_log
from davae.durations import TimeLeft
from davae.errors import ModelError, RunError
from davae.plan.expected import Expected, checkpoint_bytes, expect, is_short
from davae.plan.phase_sizes import short_prompt
from davae.recipes import Recipe, dump_recipe, load_recipe
from davae.runs.status import BARS, read_status, sparkline
from davae.tasks.base_model import BaseModel
from davae.train.run_folder import goal, marker
from davae.train.times import read_times, timed


def micro(*changes: str) -> Recipe:
    recipe = load_recipe("micro", ["stage1.max_steps=10", "stage2.max_steps=400", "stage2.warmup_steps=5", *changes])
    assert isinstance(recipe, Recipe)
    return recipe


def run_folder(path: Path, recipe: Recipe, done: tuple[str, ...] = (), step: int = 0) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump_recipe(recipe))
    for name in done:
        marker(path, name).write_text(goal(recipe, name))
    records = [{"stage": "stage1", "step": n, "l1": 1 / n} for n in range(1, 11)]
    records += [
        {"stage": "stage2", "step": n, "loss_base": 1.0, "loss_detail": 2.0 - n / 100} for n in range(1, step)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    timing = [{"stage": "stage2", "step": n, "seconds_step": 0.5} for n in range(1, step)]
    (path / "timing.jsonl").write_text("".join(json.dumps(record) + "\n" for record in timing))
    return path


def test_the_state_of_a_run(tmp_path: Path):
    folder = run_folder(tmp_path / "run", micro(), ("stage1", "cache"), 101)
    found = read_status(folder)
    assert [(p.name, p.done, p.step, p.steps) for p in found.phases] == [
        ("stage1", True, 10, 10), ("cache", True, None, None), ("stage2", False, 100, 400), ("report", False, None, None),
    ]  # fmt: skip
    assert found.next == "stage2"
    assert found.process is None
    assert found.seconds_left == 150
    assert found.phases[2].losses["loss_detail"][-1] == 1.0
    (folder / "checkpoints" / "stage2-00000115").mkdir()
    (folder / "checkpoints" / "broken-stage2-00000200").mkdir()
    assert read_status(folder).phases[2].step == 115, "saved by a stop, after the last logged step"
    longer = run_folder(tmp_path / "longer", micro("stage2.max_steps=800"))
    marker(longer, "stage2").write_text(goal(micro(), "stage2"))
    assert not read_status(longer).phases[2].done, "a shorter training's marker"


def test_the_verb_shows_it(tmp_path: Path):
    folder = run_folder(tmp_path / "run", micro(), ("stage1", "cache"), 101)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["status", str(folder), "--json", str(tmp_path / "s.json")])
    assert result.exit_code == 0
    for words in ("stage 2 at step 100 of 400", "2 min 30 s", "next: stage 2", BARS[0], BARS[-1], "loss_detail"):
        assert words in result.output
    values = json.loads((tmp_path / "s.json").read_text())
    assert (values["next"], values["seconds_left"]) == ("stage2", 150)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "nothing is changed"
    with pytest.raises(ModelError, match="not a run folder"):
        read_status(tmp_path)
    assert "Draw with it" not in result.output
    done = run_folder(tmp_path / "done", micro(), ("stage1", "cache", "stage2", "report"))
    shown = CliRunner().invoke(app, ["status", str(done)]).output
    assert f"Draw with it: davae sample {done} PROMPT\nPublish it: davae export {done} --out FOLDER" in shown


@pytest.mark.parametrize("name", ["micro-base", "imagenette128-sr", "imagenette128-dcgen", "imagenette128-micro"])
def test_runs_of_every_kind_have_a_state(name: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(name)))
    found = read_status(tmp_path)
    assert found.next == found.phases[0].name
    assert all(phase.step == 0 for phase in found.phases if phase.steps)


def test_sparklines():
    assert sparkline([0.0, 1.0]) == BARS[0] + BARS[-1]
    assert sparkline([3.0, 3.0]) == BARS[0] * 2
    assert len(sparkline(list(range(1000)))) == 40
    assert sparkline([float("nan"), float("inf")]) == sparkline([]) == ""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_that_of_the_whole_run():
    clock = Clock()
    left = TimeLeft({"stage1": 100.0, "stage2": 300.0}, clock)
    assert left.seconds is None
    left.observe("stage1", 0, 10)
    assert left.seconds == 400
    clock.now = 40.0
    left.observe("stage1", 2, 10)  # 20 s a step, twice what was expected
    assert left.seconds == 2 * (80 + 300)
    left.observe("captions", 1, 3)
    assert left.seconds is None
    left.observe("stage2", 50, 100)  # resumed in its middle
    assert left.seconds == 2 * 150
    clock.now += 30
    left.observe("stage2", 60, 100)
    assert left.seconds == pytest.approx(120)


def test_phases_are_timed_over_all_starts(tmp_path: Path):
    with timed(tmp_path, "stage1"):
        pass
    first = read_times(tmp_path)["stage1"]
    with pytest.raises(KeyError), timed(tmp_path, "stage1"):
        raise KeyError
    assert read_times(tmp_path)["stage1"] >= first
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "times.json").write_text('{"vae": 2, "dit": 3}')
    assert list(read_times(tmp_path)) == ["base", "stage1"]
    assert read_times(tmp_path)["base"] == 5
    (tmp_path / "times.json").write_text("[")
    assert "stage1" not in read_times(tmp_path)


def test_the_header_says_all_before_any_work(tmp_path: Path):
    recipe = micro()
    expected = Expected({"stage1": 600.0, "stage2": 7200.0}, 3 << 30)
    lines = dict(header.start_lines(recipe, tmp_path / "new", "upgrade", expected, "CPU, 2 threads", 2 << 30))
    assert set(lines) == {"base", "device", "data", "folder", "steps", "time", "disk", "stop"}
    assert "openmoji" in lines["data"]
    assert "(new)" in lines["folder"]
    assert "10 of" in lines["steps"]
    assert "2 h 10 min" in lines["time"]
    assert "does not fit" in lines["disk"]
    assert "Ctrl-C" in lines["stop"]
    assert f"davae status {tmp_path / 'new'}" in lines["stop"]
    folder = run_folder(tmp_path / "run", recipe, ("stage1", "cache"), 101)
    lines = dict(header.start_lines(recipe, folder, "train-vae", None, "CPU", 1))
    assert "goes on: stage 1 done, cache done, stage 2 at step 100 of 400" in lines["folder"]
    assert "stage 2" not in lines["steps"]
    assert "time" not in lines


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path):
    folder = run_folder(tmp_path / "run", micro("stage2.max_steps=10"), ("stage1", "cache", "stage2", "report"), 11)
    assert header.folder_state(folder, micro("stage2.max_steps=10")) == "done"
    longer = header.folder_state(folder, micro("stage2.max_steps=12"))
    assert longer == "goes on: stage 1 done, cache done, stage 2 at step 10 of 12"
    assert header.folder_state(folder, micro("stage1.max_steps=30")) == "goes on: stage 1 at step 10 of 30"
    assert read_status(folder).next is None


def test_a_finished_run_shows_no_header(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = run_folder(tmp_path / "run", micro(), ("stage1", "cache", "stage2", "report"))
    with caplog.at_level(logging.INFO, "davae"):
        assert header.show_start(micro(), folder, "upgrade") == {}
    assert not caplog.records


def test_estimates_follow_steps_and_speed():
    recipe = micro()
    assert is_short(micro("stage2.max_steps=20"))
    assert not is_short(recipe)
    shapes = BaseModel.of(recipe).shapes
    slow, fast = expect(recipe, shapes, 1e9), expect(micro("stage1.max_steps=30"), shapes, 2e9)
    assert slow.seconds["stage1"] == pytest.approx(fast.seconds["stage1"] * 2 / 3)
    assert slow.seconds["stage2"] == pytest.approx(fast.seconds["stage2"] * 2)
    short = expect(recipe, shapes, 1e9, short_prompt(BaseModel.of(recipe)))
    assert short.seconds["stage2"] < slow.seconds["stage2"] / 3, "micro's T5 is silent: 21 tokens in the place of 333"
    assert short_prompt(BaseModel.of(load_recipe("clothing"))) is None
    run = recipe.run.model_copy(update={"keep_checkpoints": 1, "keep_every": 0})
    assert checkpoint_bytes(recipe.stage2.model_copy(update={"ema_decay": 0.999}), run, 10) == 3 * 4 * 10 * 4
    assert slow.disk > checkpoint_bytes(recipe.stage2, recipe.run, 1000)


def test_the_log_of_a_run_holds_its_messages_and_its_end(tmp_path: Path):
    logger = logging.getLogger("davae.somewhere")

    def fail() -> None:
        with run_log() as log:
            logger.warning("before the folder is known")
            log.open(tmp_path)
            logger.warning("after")
            raise RunError("the disk is full")

    with pytest.raises(RunError):
        fail()
    logger.warning("of another run")
    text = (tmp_path / LOG).read_text()
    places = [
        text.index(word) for word in ("davae 0", "before the folder", "WARNING after", "RunError: the disk is full")
    ]
    assert places == sorted(places)
    assert "of another run" not in text
    with run_log():
        pass  # a run that did nothing keeps no log


def test_a_header_of_several_processes_starts_no_process_group(monkeypatch: pytest.MonkeyPatch):
    """The training starts it, with its own timeout and engine; a header that did so once made FSDP2's gradients differ."""
    from davae.commands import header
    from davae.train.distributed import launched

    def refuse() -> None:
        raise AssertionError("this starts a process group")

    monkeypatch.setattr(header, "own_device", refuse)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 2)
    assert header.device_name()
