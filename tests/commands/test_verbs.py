"""Every verb: its help fits 80 columns, its options have the names that users know, mistakes are one line."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from davae import console
from davae.cli import app
from davae.commands import verbosity
from davae.commands.inspect import PHASES
from davae.commands.progress import next_steps, show_hint, show_place
from davae.commands.verbs import ALIASES, HINTS, hint, with_own_names
from davae.errors import RecipeError
from davae.plan.phase_sizes import ASSUMED_IMAGES

GROUP: Any = typer.main.get_command(app)


def all_verbs(command: Any = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, below in getattr(command, "commands", {}).items():
        yield from all_verbs(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


VERBS = dict(all_verbs())


@pytest.fixture(autouse=True)
def _usual_verbosity() -> Iterator[None]:
    yield
    verbosity.set_verbosity(0)


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_fits_80_columns(path: tuple[str, ...]):
    shown = CliRunner().invoke(app, [*path, "-h"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0
    for line in shown.output.splitlines():
        assert len(line) <= 80
        assert "…" not in line, "a name or word is cut"
        assert not re.search(r"\|[a-z0-9]*\s{2,}", line), "a choice is broken"
    assert "--verbose" in shown.output


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_is_a_sentence_in_the_list_of_verbs_and_uses_the_field_s_word(path: tuple[str, ...]):
    """The list shows the first paragraph: an example is a paragraph of its own."""
    command = VERBS[path]
    assert "Example" not in (command.help or "").split("\n\n")[0]
    texts = [command.help or "", *(getattr(p, "help", None) or "" for p in command.params)]
    words = re.sub(r"`[^`]*`", "", " ".join(texts))
    assert not re.search(r"\bpictures?\b", words, re.I)


def test_phases_fit_80_columns(monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, width=80))
    phase = {"name": "sampling", "device_gib": 145.21, "host_gib": 211.2, "machine_gib": 1689.6, "disk_gib": 1394.27,
             "hours": 123.45, "batch_size": 128, "remedy": ""}  # fmt: skip
    phases = [phase | {"fits": fits} for fits in (True, False)]
    console.show_phases({"gpus": 8, "gpu": "b200-180gb", "gpu_gib": 180.0, "phases": phases})
    assert "1394.27" in shown.getvalue()
    assert "…" not in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 80


def test_inspect_names_the_images_that_it_plans_for():
    assert f"{ASSUMED_IMAGES:,} images" in PHASES


def test_upgrade_is_the_first_verb():
    assert next(iter(GROUP.commands)) == "upgrade"
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    assert re.findall(r"^│ ([a-z][a-z-]+) ", shown, re.M)[0] == "upgrade"


def options_of(path: str) -> dict[str, Any]:
    return {word: p for p in VERBS[tuple(path.split())].params for word in p.opts if word.startswith("--")}


def test_guidance_and_steps_have_one_default():
    drawing = ("sample", "make-data", "evaluate generation", "evaluate prompts", "evaluate geneval")
    assert {options_of(path)["--guidance"].default for path in drawing} == {2.5}
    assert {options_of(path)["--steps"].default for path in drawing} == {30}


@pytest.mark.parametrize(
    "name", ["--num-inference-steps", "--guidance-scale", "--negative-prompt", "--height", "--width", "--lora",
             "--prompt-file", "--seed"],
)  # fmt: skip
def test_sample_takes_the_names_that_users_know(name: str):
    options = options_of("sample")
    assert name in options or ALIASES[name] in options


@pytest.mark.parametrize("word", [*HINTS, "--unheard-of"])
def test_an_unknown_option_is_a_hint(word: str):
    options = {" ".join(path): list(options_of(" ".join(path))) for path in VERBS}
    named = {"--set", "--out", "--help", *(option for known in options.values() for option in known)}
    for path, known in options.items():
        if word not in known:
            found = hint(word, known)
            assert found == HINTS.get(word, "`--help` lists the options"), path
            assert set(re.findall(r"--[a-z-]+", found)) <= named, path


def test_a_slip_of_the_keyboard_is_named_and_nothing_else():
    known = list(options_of("sample"))
    assert hint("--gudance", known) == "did you mean --guidance?"
    assert "--times 2" in hint("--scale", known)
    assert hint("--batch_size", known) == "did you mean --batch-size?"
    assert "--compile" not in hint("--resume", known) + hint("--resize", known)
    assert hint("--seed=4", ["--out"]) == HINTS["--seed"]


@pytest.mark.parametrize("word", ["--resume", "--max-steps=3", "--seed", "--num-inference-steps"])
def test_a_hint_is_one_line_and_status_two(word: str):
    result = CliRunner().invoke(app, ["upgrade", "micro", word])
    assert isinstance(result.exception, RecipeError), "main() makes one line and status 2 of it"
    assert "`" in str(result.exception)
    assert str(result.exception).startswith(word.partition("=")[0] + ": ")


def test_names_of_other_programs_become_davae_s():
    known = {"--steps", "--guidance"}
    given = [
        "a",
        "--num-inference-steps",
        "4",
        "--guidance-scale=3",
        "--num_inference_steps=5",
        "--",
        "--guidance-scale",
    ]
    assert with_own_names(given, known) == [
        "a", "--steps", "4", "--guidance=3", "--steps=5", "--", "--guidance-scale",
    ]  # fmt: skip
    assert with_own_names(["--cfg-scale", "2"], {"--cfg-scale", "--guidance"}) == ["--cfg-scale", "2"]
    assert with_own_names(["--guidance-scale"], set()) == ["--guidance-scale"]


def test_verbosity():
    ours = logging.getLogger("davae")
    for flag, level, state in (("-q", logging.WARNING, -1), ("-v", logging.NOTSET, 1)):
        assert CliRunner().invoke(app, ["recipes", flag]).exit_code == 0
        assert (ours.level, verbosity.state.level) == (level, state)


def test_quiet_draws_no_progress(capsys: pytest.CaptureFixture):
    from davae.console import progress_display, show_lines
    from davae.train.loop import Progress

    verbosity.set_verbosity(-1)
    with progress_display({"stage1": 2.0}) as observer:
        observer(Progress("stage1", 1, 2, 0.0))
    show_lines("title", [("a", "b")])
    assert capsys.readouterr() == ("", "")


def test_the_list_of_presets_is_json_too(tmp_path: Path):
    shown = CliRunner().invoke(app, ["inspect", "--json", str(tmp_path / "presets.json")])
    values = json.loads((tmp_path / "presets.json").read_text())
    assert values["sd35-medium"]["hub"] == "stabilityai/stable-diffusion-3.5-medium"
    assert all(name in shown.output for name in values)


@pytest.mark.parametrize(
    "width", [None, 40, 60, 200], ids=lambda width: f"terminal of {width}" if width else "a pipe"
)
def test_a_table_cuts_no_number_and_no_name(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(console, "console", Console(width=width or 80, force_terminal=bool(width), color_system=None))
    names = ["FD-lite0", "patch-FD-lite0", "KID-lite0", "precision", "recall", "PSNR", "SSIM", "[bold]"]
    numbers = [f"{167.25 + n}" for n in range(len(names))]
    console.table("Table 5", ["row", *names], [["full", *numbers], ["without", *numbers]])
    path, note = "runs/a-name-longer-than-others", "a sentence that is wrapped where there is little room for it"
    console.table("Notes", ["run", "note"], [[path, note], ["b", ""]])
    lines = capsys.readouterr().out.splitlines()
    shown = " ".join(lines)
    assert "…" not in shown
    assert all(shown.count(number) == 2 for number in numbers)
    assert all(name in shown for name in [*names, "full", "without", path, *note.split()])
    assert not width or max(map(len, lines)) <= width


def test_a_hint_stays_out_of_the_output(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
    with caplog.at_level("INFO", "davae"):
        show_hint(*next_steps(Path("runs/mine")))
        show_place("runs/mine/report.html")
    assert "davae sample runs/mine PROMPT" in caplog.text
    assert capsys.readouterr().out.strip() == "runs/mine/report.html"
