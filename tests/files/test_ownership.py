"""What davae replaces: its own folders and files, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from davae.commands.options import summary_path
from davae.errors import RecipeError, RunError
from davae.files.atomic import atomic_folder
from davae.files.outputs import (
    check_archive,
    check_figures,
    check_image,
    check_place,
    check_tensor_file,
    figures_text,
    save_image,
    write_figures,
)
from davae.files.ownership import MARK, check_out, check_run, lock_folder, only_writer, unowned
from davae.sample.resume import kept_images


def written(folder: Path, **files: str) -> Path:
    with atomic_folder(folder) as partial:
        for name, text in (files or {"config.json": "{}"}).items():
            (partial / name).write_text(text)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_of_davae_is_replaced_and_carries_a_mark(tmp_path: Path):
    out = written(tmp_path / "out", **{"config.json": "1"})
    assert (out / MARK).is_file()
    check_out(out)
    written(out, **{"weights.bin": "2"})
    assert sorted(p.name for p in out.iterdir()) == [MARK, "weights.bin"]
    (out / ".DS_Store").write_text("")  # file managers leave it anywhere
    check_out(out)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    check_out(tmp_path / "absent" / "deep")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "which davae did not write"),
        ("sub/notes.txt", "which davae did not write"),
        (".git/config", "which davae did not write"),
        ("README.md", "was edited since davae wrote it"),
    ],
)
def test_work_of_others_inside_a_folder_of_davae_is_kept(tmp_path: Path, name: str, message: str):
    out = written(tmp_path / "out", **{"README.md": "a card", "config.json": "{}"})
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = tree(tmp_path)
    for attempt in (lambda: check_out(out), lambda: written(out)):
        with pytest.raises(RunError, match=message):
            attempt()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link", "below a file", "copied mark", "diffusers"])
def test_what_davae_did_not_write_is_refused_and_stays(tmp_path: Path, kind: str):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    out = mine
    if kind == "file":
        out = mine / "thesis.txt"
    elif kind == "link":
        out = tmp_path / "link"
        out.symlink_to(mine)
    elif kind == "below a file":
        out = mine / "thesis.txt" / "out"
    elif kind == "copied mark":
        (mine / MARK).write_text('{"davae": "0.1", "files": []}')
    elif kind == "diffusers":  # a download with the same kind of files
        (mine / "thesis.txt").unlink()
        (mine / "config.json").write_text('{"_class_name": "AutoencoderKL", "_diffusers_version": "0.30"}')
    before = tree(tmp_path)
    with pytest.raises(RunError) as refused:
        check_out(out)
    assert "\n" not in str(refused.value)
    with pytest.raises(RunError), atomic_folder(out) as partial:
        (partial / "x").write_text("x")
    assert tree(tmp_path) == before


def test_a_link_to_a_folder_of_davae_stays_and_its_target_is_replaced(tmp_path: Path):
    target = written(tmp_path / "disk" / "out")
    (tmp_path / "out").symlink_to(target)
    written(tmp_path / "out", **{"b.json": "2"})
    assert (tmp_path / "out").is_symlink()
    assert sorted(tree(target)) == [MARK, "b.json"]
    (target / "precious").symlink_to(tmp_path)  # a link inside counts as a file of others
    with pytest.raises(RunError, match="'precious'"):
        written(tmp_path / "out")


def test_inputs_runs_and_the_current_folder_are_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    pipeline = written(run / "pipeline")
    for out in (run, tmp_path, run / "sub" / ".."):
        with pytest.raises(RunError, match="which this command reads"):
            check_out(out, [run, "organisation/name"])
    for out in (pipeline, pipeline / "vae", run / "cache"):
        with pytest.raises(RunError, match="belongs to the run"):
            check_out(out)
    check_out(run / "exported", [run])
    monkeypatch.chdir(written(tmp_path / "here"))
    for out in (Path("."), Path(".."), Path("/")):
        with pytest.raises(RunError):
            check_out(out)
    assert pipeline.is_dir()


@pytest.mark.parametrize(
    "files",
    [
        {"model_index.json": '{"_class_name": "StableDiffusion3Pipeline", "vae": ["davae", "DetailVAE"]}',
         "vae/config.json": "{}", "vae/diffusion_pytorch_model.safetensors": ""},
        {"model_index.json": "{}", "README.md": "# x\n\nMade with davae 0.1.0, after",
         "scheduler/scheduler_config.json": ""},
        {"upgrade.safetensors": "", "README.md": "Made with davae 0.1.0, after", "vae/config.json": "{}"},
        {"config.json": '{"_class_name": "DetailVAE"}', "diffusion_pytorch_model.safetensors": ""},
    ],
)  # fmt: skip
def test_folders_of_davae_versions_without_marks_are_replaced(tmp_path: Path, files: dict[str, str]):
    out = tmp_path / "out"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    assert unowned(out) is None
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in str(unowned(out))


def test_a_run_takes_only_its_own_folder(tmp_path: Path):
    never = lambda step: False  # noqa: E731
    for name in ("cache", "vae", "pipeline", "report.html", "metrics.jsonl", "upgrade.safetensors"):
        project = tmp_path / f"project-{name}"
        place = project / name
        if "." in name:
            project.mkdir()
            place.write_text("mine")
        else:
            place.mkdir(parents=True)
            (place / "mine.txt").write_text("mine")
        with pytest.raises(RunError, match=f"holds '{name}' and is not a run"):
            check_run(project, never)
        (project / "recipe.yaml").write_text("name: x\n")  # a recipe alone makes no run
        with pytest.raises(RunError, match="is not a run"):
            check_run(project, never)
    other = tmp_path / "other"
    (other / "src").mkdir(parents=True)
    check_run(other, never)  # nothing that a run would write over
    (other / "checkpoints").mkdir()  # of a run that was killed at once
    check_run(other, never)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    (run / "vae").mkdir()
    (run / "vae" / "diffusion_pytorch_model.safetensors").write_text("")  # of a davae without marks
    check_run(run, never)
    (run / "vae" / "mine.txt").write_text("")
    with pytest.raises(RunError, match=r"mine\.txt"):
        check_run(run, never)
    check_run(run, lambda step: step == "stage1")  # only read
    with pytest.raises(RunError, match="is a file"):
        check_run(run / "recipe.yaml", never)


def test_one_process_writes_into_a_folder(tmp_path: Path):
    out = tmp_path / "out"
    with only_writer(out):
        for _ in range(2):
            with pytest.raises(RunError, match="another davae process writes here"), only_writer(out):
                pass
    with only_writer(out):
        pass
    assert list(out.iterdir()) == []
    assert lock_folder(out) is not None
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(RunError, match="file"), only_writer(place):
            pass


# -- single files ----------------------------------------------------------------------------------------------------


def test_figures_are_written_over_figures_alone(tmp_path: Path):
    path = tmp_path / "f.json"
    write_figures(path, {"psnr": 1.0})
    write_figures(path, {"names": "only text"})
    write_figures(path, {"psnr": 2.0})
    assert json.loads(path.read_text()) == {"psnr": 2.0}
    path.write_text(json.dumps({"psnr": 2.0, "vae": "x"}, indent=2) + "\n")  # as davae wrote it before
    check_figures(path)
    path.write_text("")  # of a failed redirection
    check_figures(path)
    foreign = [
        "notes", "[1]", json.dumps({"mine": 1}), '{"a": 1', "\udcff",
        json.dumps({"_class_name": "AutoencoderKL", "layers": 2}, indent=2) + "\n",
        json.dumps({"name": "package", "version": "1.0"}, indent=2) + "\n",
    ]  # fmt: skip
    for text in foreign:
        path.write_text(text, errors="surrogateescape")
        before = path.read_bytes()
        with pytest.raises(RunError, match="not a file of figures that davae wrote"):
            write_figures(path, {"psnr": 3.0})
        assert path.read_bytes() == before
    with pytest.raises(RunError, match="is a folder"):
        check_figures(tmp_path)
    with pytest.raises(RunError, match="is a file"):
        check_figures(path / "x.json")
    write_figures(Path("/dev/null"), {"psnr": 1.0})
    assert not Path("/dev/null").is_file()


def test_json_is_checked_before_any_work(tmp_path: Path):
    from davae.cli import app

    path = tmp_path / "notes.json"
    path.write_text("mine")
    result = CliRunner().invoke(app, ["recipes", "--json", str(path)])
    assert isinstance(result.exception, RecipeError)
    assert path.read_text() == "mine"


def test_every_json_option_is_the_checked_one(tmp_path: Path):
    import typer

    from davae.cli import app

    def options(command: Any) -> list[Any]:
        below = [p for part in getattr(command, "commands", {}).values() for p in options(part)]
        return [*command.params, *below]

    (tmp_path / "mine.json").write_text("mine")
    found = [option for option in options(typer.main.get_command(app)) if "--json" in option.opts]
    assert len(found) > 10
    for option in found:
        with pytest.raises(RecipeError, match=r"--json .* cannot be written: .* not a file of figures"):
            option.callback(None, option, tmp_path / "mine.json")


WITH_SUMMARY = (
    "reconstruction --vae /nowhere --data /nowhere",
    "generation --pipeline /nowhere --data /nowhere",
    "pictures --generated /nowhere --data /nowhere --resolution 32",
    "enlarging --model /nowhere --data /nowhere",
)


@pytest.mark.parametrize("command", WITH_SUMMARY)
@pytest.mark.parametrize("text", ["mine", '{"images": 3}', "[1]", '{"layout": "x"', figures_text({"psnr": 1.0})])
def test_the_summary_next_to_json_is_checked_before_any_work(command: str, text: str, tmp_path: Path):
    from davae.cli import app

    path = tmp_path / "r.data.json"
    path.write_text(text)
    result = CliRunner().invoke(app, ["evaluate", *command.split(), "--json", str(tmp_path / "r.json")])
    assert isinstance(result.exception, RecipeError)
    assert re.search(r"--json \S+/r\.json: .*r\.data\.json: it exists and is not a summary", str(result.exception))
    assert path.read_text() == text


def test_a_summary_is_written_over_a_summary_alone(picture_folder: Path, tmp_path: Path):
    from davae.cli import app

    both = ["--generated", str(picture_folder), "--data", str(picture_folder)]
    words = ["evaluate", "pictures", *both, "--resolution", "32", "--features", "lite0", "--patch-size", "0"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "r.json")])
        assert result.exit_code == 0, result.exception
    summary = tmp_path / "r.data.json"
    assert summary_path(tmp_path / "r.json") == summary
    assert json.loads(summary.read_text())["images"] == 12
    summary.unlink()
    summary.mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        summary_path(tmp_path / "r.json")
    assert summary_path(Path("/dev/null")) is None, "nothing is put next to a device"


def test_images_are_written_over_davae_s_alone(tmp_path: Path):
    path, image = tmp_path / "a-rose-seed0-000.png", Image.new("RGB", (2, 2))
    save_image(image, path)
    save_image(image, path)
    image.save(path)
    with pytest.raises(RunError, match="not an image that davae wrote"):
        check_image(path)
    image.save(tmp_path / "grid-seed0.png")  # a davae without marks drew both
    check_image(path)
    other = tmp_path / "photo.png"
    image.save(other)
    with pytest.raises(RunError, match="not an image that davae wrote"):
        save_image(image, other)
    other.write_text("text")
    with pytest.raises(RunError, match="not an image that davae wrote"):
        check_image(other)


def test_weights_and_sample_files_are_written_over_davae_s_alone(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.zeros(2, np.float32)}
    for about, fine in (
        ({"davae": "0.2"}, True),
        ({"format": "davae-upgrade-1"}, True),
        ({"format": "pt"}, False),
        (None, False),
    ):
        save_file(arrays, path, about)
        if fine:
            check_tensor_file(path)
        else:
            with pytest.raises(RunError, match="not a file that davae wrote"):
                check_tensor_file(path)
    save_file(arrays, path, {"davae": "0.2"})
    with pytest.raises(RunError, match="this command reads it"):
        check_tensor_file(path, [tmp_path / "sub" / ".." / "x.safetensors", path])
    npz, parts = tmp_path / "s.npz", tmp_path / "s.npz.parts"
    check_archive(npz, parts)
    np.savez(npz, arr_0=np.zeros(3))
    with pytest.raises(RunError, match="not a sample file that davae wrote"):
        check_archive(npz, parts)
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    check_archive(npz, parts)


def test_a_lock_ends_with_its_process(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from davae.files.ownership import lock_folder\n"
        "lock_folder(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with only_writer(tmp_path):
        pass


def test_no_verb_writes_into_what_a_run_writes(tmp_path: Path):
    """An image in a run's `pipeline/` would make the run refuse its own folder ever after."""
    run = tmp_path / "run"
    for part in ("checkpoints", "pipeline/vae", "samples"):
        (run / part).mkdir(parents=True)
    (run / "recipe.yaml").write_text("kind: upgrade")
    (tmp_path / "link").symlink_to(run / "pipeline")
    for place in (run / "pipeline" / "vae", run / "checkpoints", run / "cache" / "new", tmp_path / "link"):
        for check in (check_image, check_figures, check_place):
            with pytest.raises(RunError, match="belongs to the run"):
                check(place / "x.png")
        with pytest.raises(RunError, match="belongs to the run"), kept_images(place / "new", {}, {}):
            pass
        assert not (place / "new").exists()
    with pytest.raises(RunError, match="belongs to the run"):
        check_figures(run / "report.json")
    check_image(run / "samples" / "x.png")
    check_figures(run / "own.json")
