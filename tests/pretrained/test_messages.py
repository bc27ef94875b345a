"""Messages that name what was found and what to type."""

from __future__ import annotations

import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import errors

from davae.app.training import Trainings
from davae.commands.app import check_free
from davae.convert.checkpoints import load_state
from davae.data.latent_cache.import_shards import read_statistics
from davae.errors import DataError, ModelError, RecipeError, RunError
from davae.lab.commands.bench import upgrade_recipe
from davae.plan.dry_run import step_notes
from davae.pretrained import hub_errors
from davae.pretrained import open as pipeline
from davae.pretrained.hub_errors import brief, hub_reason
from davae.pretrained.open import HUB_ID
from davae.publish.export import open_run
from davae.recipes import Recipe, load_recipe, read_recipe, shipped_recipes
from davae.recipes.places import check_places, places
from davae.runs.status import read_status
from davae.runs.upgrade_run import UpgradeRun, load


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG image"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"RIFF\x00\x00\x00\x00WEBP", "a WebP image"),
        (b"\x00\x00\x00\x1cftypavif", "an image or a film"),
        (b"%PDF-1.7", "a PDF"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"GGUF\x03", "a GGUF file"),
        (b"", "empty"),
    ],
)
def test_a_file_of_another_kind_is_named(name: str, content: bytes, kind: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=kind) as caught:
        load_state(tmp_path / name)
    assert "run its code" not in str(caught.value)
    assert str(caught.value).startswith(f"checkpoint {tmp_path / name}: it is ")


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/a/b"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("403 Client Error. " + "x " * 300, response=answer(403)),
         ("gated", "https://huggingface.co/a/b", "hf auth login", "HF_TOKEN")),
        (errors.RepositoryNotFoundError("401 Client Error", response=answer(401)),
         ("no such model", "private", "hf auth login")),
        (errors.RevisionNotFoundError("404 Client Error", response=answer(404)),
         ("has no revision v9", "https://huggingface.co/a/b/commits")),
        (errors.LocalEntryNotFoundError("no network"), ("cannot be reached", "folder")),
    ],
)  # fmt: skip
def test_the_hub_s_answer_says_what_to_type(
    error: Exception, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    wrapped = OSError("something of a library")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        for word in words:
            assert word in hub_reason(raised, "a/b@v9")

    def download(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelError) as caught:
        pipeline.fetch_file("a/b@v9", "", "model_index.json")
    assert all(word in str(caught.value) for word in ("the hub did not give it", *words))


@pytest.mark.parametrize(
    "name",
    ["models/lightningdit-xl", "runs/none", "path/to/sd3.5-medium", "./micro", "../micro", "/no/where", "~/micro"],
)
def test_a_missing_folder_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    for wrong in (lambda: pipeline.fetch_file(name, "", "model_index.json"), lambda: pipeline.load_pipeline(name)):
        with pytest.raises(
            ModelError, match=f"model '{name}': there is no such folder here; give a run's folder"
        ) as caught:
            wrong()
        assert "preset" not in str(caught.value)


def test_a_preset_is_proposed_where_configs_suffice():
    with pytest.raises(ModelError, match=r"a preset or .*did you mean sd35-medium .*\? `davae inspect` lists"):
        pipeline.read_config("sd3.5-medium", "", "model_index.json")
    with pytest.raises(ModelError, match=r"embedded model or a hub id \(ORGANISATION/NAME\)$"):
        pipeline.load_pipeline("sd3.5-medium")
    with pytest.raises(ModelError, match=r"did you mean micro-upgraded[^?]*\?$"):
        pipeline.load_pipeline("micro-upgrade")


def test_a_folder_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The libraries would load the folder's weights as those of any revision."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="a/b@v1: a/b is a folder here, without revisions; give a/b, or rename it"):
        pipeline.fetch_file("a/b@v1", "", "model_index.json")


@pytest.mark.parametrize("answers", [True, False])
def test_without_the_hub_the_cache_alone_is_read(answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found: dict[str, object] = {}

    def download(*args: object, **options: object) -> str:
        found.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(pipeline, "hub_answers", lambda: answers)
    assert pipeline.fetch_file("a/b", "", "model_index.json") == tmp_path
    assert found["local_files_only"] is not answers


def test_the_hub_is_tried_once_a_minute(monkeypatch: pytest.MonkeyPatch):
    tried, clock = [], iter([600.0, 601.0, 659.0, 661.0, 662.0])

    def connect(*place: object) -> socket.socket:
        tried.append(place)
        if len(tried) == 1:
            raise OSError("no network")
        return socket.socket()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_errors, "getproxies", dict)
    monkeypatch.setattr(hub_errors, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hub_errors.socket, "create_connection", connect)
    hub_errors._listens.cache_clear()
    assert [hub_errors.hub_answers() for _ in range(5)] == [False, False, False, True, True]
    assert len(tried) == 2
    hub_errors._listens.cache_clear()


def test_long_messages_are_cut_between_words():
    text = brief(ValueError("word " * 100))
    assert text.endswith("word ...")
    assert len(text) <= 200
    assert brief(ValueError()) == "ValueError"


def test_a_used_port_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"--port {port}: .*in use; use another port"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)


def test_a_dry_run_explains_names_that_are_confused():
    changes = ["stage1.accumulation=4", "stage1.batch_size=8", "stage2.warmup_steps=30", "stage2.lr_warmup_steps=7"]
    recipe = load_recipe("micro", changes)
    assert isinstance(recipe, Recipe)
    notes = step_notes(recipe)
    assert any("stage1.accumulation: 4 batches of 8 make one optimizer step of 32 images" in note for note in notes)
    assert any("stage2.lr_warmup_steps: the learning rate rises over the first 7 steps" in note for note in notes)
    assert any("stage2.warmup_steps: N_warm" in note and "over 30 steps" in note for note in notes)
    plain = load_recipe("micro", ["stage2.warmup_steps=0", "stage2.lr_warmup_steps=0", "stage1.lr_warmup_steps=0"])
    assert isinstance(plain, Recipe)
    assert not [note for note in step_notes(plain) if "warmup" in note]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_recipes_whose_files_are_elsewhere_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = tmp_path / "inside"  # so that ../shared is this test's own
    inside.mkdir()
    monkeypatch.chdir(inside)
    recipe = load_recipe(name)
    needed = list(places(recipe))
    if not needed:
        check_places(recipe, name)
        return
    with pytest.raises(RecipeError, match=f"recipe {name}, .* is not here; ") as caught:
        check_places(recipe, name)
    assert any(word in str(caught.value) for word in ("--data", "--set", "train-base"))
    for _, text in needed:
        file = inside / text
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    check_places(recipe, name)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_path_of_a_shipped_recipe_is_a_known_place_or_a_model_on_the_hub(name: str):
    text = re.sub(r"#.*", "", shipped_recipes()[name])
    paths = set(re.findall(r"[:\s]([\w.-]*/\S+)", text)) - {text for _, text in places(read_recipe(name))}
    root = Path(__file__).parents[2]
    assert not [path for path in paths if not HUB_ID.fullmatch(path) or (root / path.split("/")[0]).exists()]


def test_a_path_that_the_user_gave_is_not_called_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    check_places(load_recipe("sd35-medium-1k", ["data.source=./mine"]), "sd35-medium-1k")
    Path("own.yaml").write_text(shipped_recipes()["sd35-medium-1k"])
    check_places(load_recipe("own.yaml"), "own.yaml")


def test_every_way_to_run_a_shipped_recipe_names_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ways = {
        "python": lambda: UpgradeRun("sd35-medium-1k", base="micro").train_dit(),
        "bench": lambda: upgrade_recipe("sd35-medium-1k", []),
        "page": lambda: Trainings(tmp_path / "runs").start("mine", "sd35-medium-1k"),
    }
    for run in ways.values():
        with pytest.raises(RecipeError, match=r"data.source: ./images is not here; give your images with --data"):
            run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opened", [load, read_status, open_run], ids=lambda function: function.__name__)
def test_a_folder_that_is_missing_is_told_from_one_of_something_else(opened: Callable[[Path], Any], tmp_path: Path):
    with pytest.raises(ModelError, match="there is no such folder; "):
        opened(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"it is not a run folder, it has no recipe.yaml; "):
        opened(tmp_path)


def test_statistics_that_are_missing_are_not_called_damaged(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such file"):
        read_statistics(tmp_path / "latents_stats.pt", 4)


def test_micro_upgraded_is_known():
    from davae import DetailVAE
    from davae.sample.open import model_places, open_autoencoder

    assert isinstance(open_autoencoder("micro-upgraded"), DetailVAE)
    assert len(model_places("micro-upgraded")) == 2
    with pytest.raises(ModelError, match="davae apply micro-upgraded --base micro --out FOLDER"):
        pipeline.fetch_file("micro-upgraded", "", "model_index.json")


def test_opening_a_pipeline_shows_no_warning_on_an_argument_of_ours(tiny_base: Path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        pipeline.load_pipeline(str(tiny_base))
    assert not [str(one.message) for one in shown if "dtype" in str(one.message)]
