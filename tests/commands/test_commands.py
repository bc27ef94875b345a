"""A recipe is data: a command in it runs only when the person typed it, and never through a shell."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import picture, tiny_upgrade_recipe
from test_sources import png, write_tar

from davae.cli import main
from davae.data.shards.commands import open_command, split_command
from davae.data.sources import open_source
from davae.dataset.opened import open_pictures
from davae.errors import ModelError, RecipeError
from davae.evaluate.upscale import make_upscaler
from davae.recipes import forbid_commands, load_recipe, permit_commands, typed_commands, validate
from davae.runs.upgrade import Upgrade


def run_cli(*arguments: str) -> int:
    """The exit status of `davae`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["davae", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _nothing_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    forbid_commands()
    yield
    forbid_commands()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    folder = tmp_path / "a $(touch ran) 'b"
    folder.mkdir()
    write_tar(folder / "-s.tar", {f"{n}.png": png(picture(n, 36, 36)) for n in range(4)})
    return folder / "-s.tar"


def hostile(tmp_path: Path, base: Path, **changes: object) -> tuple[Path, Path]:
    """A recipe file whose source is a command that leaves a mark."""
    mark = tmp_path / "ran"
    values = tiny_upgrade_recipe(base, Path("pictures"), data__source=f"pipe:touch {mark}", **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml", mark


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("upgrade", []),
        ("upgrade", ["--dry-run"]),
        ("train-vae", ["--set", "run.seed=1"]),
        ("cache-latents", ["--set", "base.resolution=16"]),
        ("train-dit", ["--set", "name='pipe:touch ran'"]),
    ],
)
def test_a_command_of_a_recipe_file_is_refused(
    verb: str, more: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, mark = hostile(tmp_path, tiny_base)
    assert run_cli(verb, str(recipe), "--out", str(tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "data.source" in error
    assert "--allow-commands" in error
    assert not mark.exists()


def test_a_command_of_the_base_that_is_trained_first_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    recipe = load_recipe("imagenette128-micro")
    values = recipe.model_dump(mode="json")
    values["base"]["train"]["data"]["source"] = "pipe:touch ran"
    changed = validate(values, "x")
    assert changed.base.train is not None  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"data\.source: 'pipe:touch ran' is a command"):
        open_pictures(changed.base.train.data, 64)  # type: ignore[union-attr]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    assert run_cli("upgrade", str(tmp_path / "x.yaml"), "--dry-run", "--data", "openmoji") == 2


def test_what_is_typed_runs_and_only_that(shard: Path, tiny_base: Path, tmp_path: Path) -> None:
    text = f"pipe:cat {shlex.quote(str(shard))}"
    data = validate(tiny_upgrade_recipe(tiny_base, Path("x"), data__source=text), "x").data
    with pytest.raises(RecipeError):
        open_pictures(data, 32)
    permit_commands(typed_commands(["run.seed=1", "data={source: other, holdout: 0.5}"]))
    with pytest.raises(RecipeError):
        open_pictures(data, 32)
    permit_commands([text])
    assert len(open_pictures(data, 32).train) + len(open_pictures(data, 32).held_out) == 4
    assert not (tmp_path / "ran").exists()
    forbid_commands()
    with pytest.raises(RecipeError):
        open_pictures(data, 32)
    permit_commands(every=True)
    assert open_pictures(data, 32).train


@pytest.mark.parametrize("override", ["data.source=pipe:a b", "data={source: 'pipe:a b'}", 'data.source="pipe:a b"'])
def test_commands_in_overrides_are_typed(override: str) -> None:
    assert typed_commands(["run.seed=2", override]) == ["pipe:a b"]


def test_a_run_folder_goes_on_when_the_command_is_typed_again(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upgrade, "train_vae", lambda run: run.out / "vae")  # opened, not trained
    write_tar(tmp_path / "s.tar", {f"{n}.png": png(picture(n, 36, 36)) for n in range(8)})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, tmp_path)))
    run = tmp_path / "run"
    command = f"pipe:cat {tmp_path}/s.tar"
    assert run_cli("train-vae", str(tmp_path / "a.yaml"), "--out", str(run), "--data", command) == 0
    capsys.readouterr()
    saved = str(run / "recipe.yaml")
    for resumed, status in (([], 2), (["--data", command], 0), (["--allow-commands"], 0), ([], 2)):
        assert run_cli("train-vae", saved, "--out", str(run), *resumed) == status, resumed
        error = capsys.readouterr().err
        assert (status == 0) or (error.count("\n") == 1 and "is a command" in error)
    assert run_cli("bench", "cache", saved, "--out", str(run)) == 2


def test_commands_start_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_command("a 'b  c' | d\\ e -f") == [["a", "b  c"], ["d e", "-f"]]
    with open_command("printf %s '$(touch ran)`touch ran`$HOME\n*'") as stream:
        assert stream.read() == b"$(touch ran)`touch ran`$HOME\n*"
    with open_command("printf 'c\\nb\\na' | sort") as stream:
        assert stream.read().split() == [b"a", b"b", b"c"]
    for text in ("true; touch ran", "true && touch ran", "echo a > ran", "true & touch ran", "echo $(touch ran)"):
        with pytest.raises((ValueError, OSError)), open_command(text) as stream:
            stream.read()
    for text in ("", "cat |", "| cat", "echo 'open", "echo \0"):
        with pytest.raises(ValueError, match=r"."):
            split_command(text)
    with pytest.raises(OSError, match="false ended with status 1"), open_command("false | cat") as stream:
        stream.read()
    with pytest.raises(OSError, match="no-such-program"), open_command("echo a | no-such-program") as stream:
        stream.read()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="is not a whole tar file"):
        open_source("pipe:echo x.parquet", 8)


def test_an_enlarging_command_gets_its_folders_as_words(tmp_path: Path) -> None:
    program = tmp_path / "up {scale} $(x).py"
    program.write_text(
        "import pathlib, sys\nassert sys.argv[3:] == ['{foo}', '{input.__class__}', '-n']\n"
        "[(pathlib.Path(sys.argv[2]) / p.name).write_bytes(p.read_bytes()) for p in pathlib.Path(sys.argv[1]).iterdir()]"
    )
    words = f"{sys.executable} '{program}' {{input}} {{output}} {{foo}} {{input.__class__}} -n"
    assert make_upscaler(words, 40)([picture(0, 20, 20)])[0].size == (40, 40)
    for command, message in (
        ("cat 'a {input} {output}", "quot"),
        ("no-such-program {input} {output}", "program no-such-program"),
    ):
        with pytest.raises(ModelError, match=message):
            make_upscaler(command, 8)
    with pytest.raises(ModelError, match="neither"):
        make_upscaler("x" * 5000, 8)
