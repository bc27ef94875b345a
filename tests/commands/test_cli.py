"""The command line as people and scripts meet it: what stands in it, how fast, what it suggests, no colour in a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_training import run_cli

from davae.cli import app
from davae.errors import ModelError, RecipeError
from davae.recipes import shipped_recipes


def davae(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`davae` in a process of its own, its output in pipes, nothing of a terminal in the environment."""
    clean = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    return subprocess.run(
        [sys.executable, "-m", "davae", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from verbs(sub, (*path, name))
    else:
        yield " ".join(path), command


def test_davae_alone_says_what_to_do_next():
    done = davae()
    assert done.returncode == 0
    for verb in ("davae sample micro-upgraded", "davae app", "davae upgrade micro --out runs/micro", "davae --help"):
        assert verb in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["upgrade", "--help"], ["app", "--help"], ["recipes"]])
def test_help_imports_no_torch(arguments: list[str]):
    code = (
        "import sys; sys.argv = ['davae', *sys.argv[1:]]\n"
        "from davae.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'diffusers', 'gradio', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("verb", "package"), [("doctor", "torch"), ("status runs/x", "diffusers")])
def test_a_package_that_is_missing_is_named(verb: str, package: str):
    code = f"import sys; sys.modules['{package}'] = None; sys.argv = ['davae', *'{verb}'.split()]\n"
    code += "from davae.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"davae: package {package} is not installed here; ")
    assert done.stderr.count("\n") == 1


def test_every_verb_gives_an_example():
    found = dict(verbs(typer.main.get_command(app)))
    assert {"upgrade", "app", "evaluate generation", "convert vavae", "recipes"} <= set(found)
    missing = [verb for verb, command in found.items() if f"`davae {verb}" not in (command.help or "")]
    assert not missing


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["upgrad", "micro"], "Did you mean 'upgrade'?"),
        (["upgrade", "micr"], "did you mean 'micro'?"),
        (["upgrade", "micro", "--dry-run", "--set", "stage1.max_step=3"], "did you mean 'max_steps'?"),
        (["reproduce", "tabl5"], "did you mean 'table5'?"),
    ],
)
def test_the_nearest_valid_name_is_suggested(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli(*arguments)
    assert says in capsys.readouterr().err


def test_tab_completes_verbs_and_recipes():
    for words, wanted in (("davae upg", "upgrade"), ("davae upgrade sd35-medium-1", "sd35-medium-1k")):
        code = "from davae.cli import app; app(prog_name='davae')"
        environment = {
            **os.environ,
            "_DAVAE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [wanted], done.stderr


def test_recipes_as_json(tmp_path: Path):
    run_cli("recipes", "--json", str(tmp_path / "recipes.json"))
    written = json.loads((tmp_path / "recipes.json").read_text())
    assert set(written) == set(shipped_recipes())
    assert all(written.values())


def test_the_page_without_its_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("app")
    assert capsys.readouterr().err == ('davae: the page needs Gradio; install it with: pip install "davae[app]"\n')


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate generation --pipeline micro --data openmoji --num 2", "--num 2: at least 4 images are needed"),
        ("sample micro cat --resolution 100", "100 pixels are not divisible by 8, a token's side; use 96"),
        (
            "sample micro cat --resolution 256",
            "256 pixels are more than this model has positions for; use 128 at most",
        ),
        ("sample micro-upgraded cat --height 128 --width 512", "512 pixels are more than .* use 256 at most"),
        ("sample clothing dress --height 64 --width 128", "draws squares, 128 x 64 is none; use --resolution"),
        ("evaluate geneval-score {results} --json {results}/x.json", "--json .* cannot be written: "),
    ],
)
def test_bad_input_of_measuring_is_one_line(command: str, message: str, tmp_path: Path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"tag": "counting", "prompt": "p", "correct": true, "filename": "00000/samples/0.png"}\n')
    with pytest.raises(RecipeError if "geneval" in command else ModelError, match=message):
        app([word.format(results=results) for word in command.split()], standalone_mode=False)
