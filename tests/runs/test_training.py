"""Whole runs of a tiny pipeline: resume to the bit after SIGKILL, a frozen base, a stock pipeline at the end."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import picture, tiny_upgrade_recipe
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from warm import start

from davae import DetailVAE
from davae.cli import main
from davae.data.latent_cache.meta import read_meta
from davae.device import record_passes
from davae.errors import DataError, Interrupted, RunError
from davae.files.atomic import atomic_folder
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import load_upgraded
from davae.recipes import Recipe, set_values, validate
from davae.runs.checks import check_shared
from davae.runs.upgrade import Upgrade
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.train import run_folder as state
from davae.train.loop import Progress, learning_rate
from davae.train.run_folder import RunFolder, read_metrics

CHANGES = {"stage1__max_steps": 8, "stage2__max_steps": 8, "run__checkpoint_every": 1}


def quiet(progress: object) -> None:
    pass


@pytest.fixture(scope="module")
def recipe_values(tiny_base: Path, picture_folder: Path) -> dict:
    return tiny_upgrade_recipe(tiny_base, picture_folder, **CHANGES)


@pytest.fixture(scope="module")
def recipe_file(recipe_values: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    return path


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted `davae upgrade`, through the command line's own entry point."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run_cli("upgrade", str(recipe_file), "--out", str(out))
    return out


def run_cli(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["davae", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    assert not code, f"davae {' '.join(arguments)} exited with {code}"


def training_records(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key != "images_per_second"}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def kill_when(recipe_file: Path, out: Path, stage: str, step: int) -> None:
    """Start the run in a process of its own and SIGKILL it once `stage` has logged `step`."""
    log = out.with_suffix(".log")
    threads = str(torch.get_num_threads())  # sums depend on it
    process = start(["-m", "davae", "upgrade", str(recipe_file), "--out", str(out)], log, OMP_NUM_THREADS=threads)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.is_alive():
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        if any(f'"stage": "{stage}", "step": {step},' in line for line in lines):
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            break
        time.sleep(0.002)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]


def test_killed_runs_resume_to_the_bit(recipe_file: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "killed"
    kill_when(recipe_file, out, "stage1", 3)
    assert not (out / "vae").exists()
    kill_when(recipe_file, out, "stage2", 3)
    assert not (out / "pipeline").exists()
    run_cli("upgrade", str(recipe_file), "--out", str(out))
    assert training_records(out) == training_records(finished)
    for file in ("vae/diffusion_pytorch_model.safetensors", "upgrade.safetensors"):
        mine, theirs = load_file(out / file), load_file(finished / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file
    mine, theirs = (json.loads((folder / "vae/config.json").read_text()) for folder in (out, finished))
    assert {**mine, "_name_or_path": None} == {**theirs, "_name_or_path": None}


def test_every_step_is_logged_once_with_the_contract_s_keys(finished: Path):
    records = read_metrics(finished / "metrics.jsonl")
    for stage in ("stage1", "stage2"):
        assert [r["step"] for r in records if r["stage"] == stage] == list(range(1, 9))
    first, last = records[0], records[-1]
    assert {"loss", "l1", "lpips", "kl", "align", "lr", "images_per_second"} <= first.keys()
    assert {"loss", "loss_base", "loss_detail", "detail_weight", "lr", "images_per_second"} <= last.keys()
    stage1 = [r for r in records if r["stage"] == "stage1"]
    assert ["adversarial" in r for r in stage1] == [False, *[True] * 7]  # gan_start: 2
    stage2 = [r["detail_weight"] for r in records if r["stage"] == "stage2"]
    assert stage2[:3] == [0.0, 0.5, 1.0]  # warmup_steps: 2


def test_the_base_encoder_never_changes_by_a_bit(finished: Path, tiny_base: Path):
    base = load_file(tiny_base / "vae/diffusion_pytorch_model.safetensors")
    vae = load_file(finished / "vae/diffusion_pytorch_model.safetensors")
    frozen = {n.removeprefix("base_"): t for n, t in vae.items() if n.startswith("base_encoder.")}
    assert frozen
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen.items())
    moved = [n for n in vae if n.startswith(("detail_encoder.conv_in", "decoder.conv_out"))]
    assert all(not torch.equal(vae[n], base[n.removeprefix("detail_")]) for n in moved)


def test_statistics_of_the_cache_stand_in_the_autoencoder(finished: Path):
    meta = json.loads((finished / "cache" / "meta.json").read_text())
    vae = DetailVAE.from_pretrained(finished / "pipeline" / "vae")
    assert vae.config.detail_mean == pytest.approx(meta["mean"][4:])
    assert vae.config.detail_std == pytest.approx(meta["std"][4:])


def test_the_export_is_a_stock_pipeline(finished: Path):
    pipeline = StableDiffusion3Pipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    assert pipeline.transformer.config.in_channels == 12
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def test_the_report_holds_its_figures(finished: Path):
    figures = json.loads((finished / "report.json").read_text())
    page = (finished / "report.html").read_text()
    assert [row["tokens"] for row in figures["speed"]] == [16, 64, 16]
    assert [row["name"] for row in figures["reconstruction"]] == [
        "base + bicubic",
        "zero detail",
        "random detail",
        "full",
    ]
    assert f"{figures['reconstruction'][-1]['psnr']:.2f}" in page
    assert page.count("data:image/png;base64,") >= 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page


def test_a_finished_run_does_nothing_again(recipe_file: Path, finished: Path, capsys: pytest.CaptureFixture):
    rewritten = ("recipe.yaml", ".lock", ".process.json")  # the recipe, and which process holds the folder
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name not in rewritten}
    run_cli("upgrade", str(recipe_file), "--out", str(finished))
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name not in rewritten}
    assert before == after
    assert "Held-out images" in capsys.readouterr().out


@contextmanager
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`torch.compile` without the compiler behind it, which takes minutes; yields what was compiled, and how."""
    made: list[str] = []
    compile_module = torch.nn.Module.compile

    def without_inductor(module: torch.nn.Module, **options: Any) -> None:
        made.append(f"{type(module).__name__} {options.get('mode')}")
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    yield made
    torch._dynamo.reset()


def test_compiled_passes_draw_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    words = ("sample", str(finished), "a red square", "--num", "1", "--steps", "2", "--out")
    run_cli(*words, str(tmp_path / "eager"))
    with dynamo_alone(monkeypatch) as made:
        run_cli(*words, str(tmp_path / "blocks"), "--compile", "blocks")
        assert set(made) == {"JointTransformerBlock None"}
        pictures = [np.asarray(Image.open(next((tmp_path / n).glob("a-red*"))), int) for n in ("eager", "blocks")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
        network = load_pipeline(str(finished / "pipeline")).transformer
        record_passes(network)
        assert made[-1] == "SD3Transformer2DModel reduce-overhead"
    assert "no GPU here" in fails(capsys, *words, str(tmp_path / "x"), "--compile", "graphs")
    line = fails(capsys, *words, str(tmp_path / "x"), "--compile", "blocks", "--offload", "model")
    assert "exclude one another" in line


def test_a_recorded_pass_gives_tensors_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph writes every pass into the same memory."""
    memory = torch.zeros(2)

    def graph(module: torch.nn.Module, **options: Any) -> None:
        module._compiled_call_impl = lambda x: (memory.copy_(x),)  # type: ignore[assignment]

    monkeypatch.setattr(torch.nn.Module, "compile", graph)
    network = torch.nn.Identity()
    record_passes(network)
    (first,), (second,) = network(torch.tensor([1.0, 2.0])), network(torch.tensor([3.0, 4.0]))
    assert first.tolist() == [1.0, 2.0]
    assert second.tolist() == [3.0, 4.0]


def test_sample_writes_pictures_and_a_grid(finished: Path):
    run_cli("sample", str(finished), "a red square", "--num", "3", "--seed", "1", "--steps", "2")
    names = sorted(path.name for path in (finished / "samples").iterdir())
    assert names == [
        "a-red-square-seed1-000.png",
        "a-red-square-seed1-001.png",
        "a-red-square-seed1-002.png",
        "grid-seed1.png",
    ]


def test_evaluate_writes_plain_numbers(finished: Path, picture_folder: Path, tmp_path: Path):
    file = tmp_path / "r.json"
    run_cli(
        "evaluate",
        "reconstruction",
        "--vae",
        str(finished / "vae"),
        "--data",
        str(picture_folder),
        "--json",
        str(file),
    )
    assert json.loads(file.read_text())["pictures"] == 12
    run_cli(
        *("evaluate", "generation", "--pipeline", str(finished), "--data", str(picture_folder)),
        *("--num", "4", "--steps", "2", "--json", str(file)),
    )
    assert json.loads(file.read_text())["fd_lite0"] > 0


def test_export_writes_a_small_upgrade_that_gives_the_same_model(finished: Path, tiny_base: Path, tmp_path: Path):
    run_cli("export", str(finished), "--out", str(tmp_path / "up"), "--dtype", "float32")
    upgraded = load_upgraded(load_pipeline(str(tiny_base)), tmp_path / "up")
    exported = load_pipeline(str(finished / "pipeline"))
    options = SamplingOptions(steps=2, guidance=2.0, seed=1)
    mine, theirs = (generate(p, ["a red square"], options)[0] for p in (upgraded, exported))
    assert np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_an_exported_upgrade_can_be_gone_on_from(finished: Path, recipe_values: dict, tmp_path: Path):
    run_cli("export", str(finished), "--out", str(tmp_path / "up"), "--dtype", "float32")
    recipe = validate({**recipe_values, "init": str(tmp_path / "up")}, "more")
    run = Upgrade(recipe, tmp_path / "more", quiet)  # type: ignore[arg-type]
    run.train_vae()
    run.cache_latents()
    before, after = (load_file(folder / "vae/diffusion_pytorch_model.safetensors") for folder in (finished, run.out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(run.vae().std, DetailVAE.from_pretrained(finished / "vae").std)
    upgrade = load_file(finished / "upgrade.safetensors")
    start = dict(run.stage2_task().transformer.named_parameters())
    assert upgrade
    assert all(torch.equal(start[name], upgrade[name]) for name in upgrade)
    run.train_dit()
    assert len([r for r in read_metrics(run.out / "metrics.jsonl") if r["stage"] == "stage2"]) == 8


def test_another_stage_2_on_the_same_detail_vae(
    recipe_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    other = ("--stage1", str(finished), "--out", str(tmp_path / "other"))
    run_cli("train-dit", str(recipe_file), *other, "--set", "stage2.seed=5", "--set", "stage2.new_weights=random")
    assert not (tmp_path / "other" / "vae").exists()
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (finished, tmp_path / "other"))
    assert {record["stage"] for record in second} == {"stage2"}
    assert [r["loss"] for r in second] != [r["loss"] for r in first if r["stage"] == "stage2"]
    run_cli("train-dit", str(recipe_file), *other[2:], "--set", "stage2.seed=5", "--set", "stage2.new_weights=random")
    assert not (tmp_path / "other" / "vae").exists(), "it goes on with that of the first run"
    wrong = ("train-dit", str(recipe_file), *other[:2], "--set", "stage1.lr=0.5", "--out", str(tmp_path / "x"))
    for dry in ((), ("--dry-run",)):
        assert "was made from another autoencoder or data: stage1.lr" in fails(capsys, *wrong, *dry)


def test_another_cache_on_the_same_detail_vae(recipe_values: dict, finished: Path, tmp_path: Path, caplog: Any):
    """Another cache is encoded anew in the new run, which then needs the first one no more."""
    first, out = tmp_path / "first", tmp_path / "other"
    shutil.copytree(finished, first)
    values = {**recipe_values, "cache": {**recipe_values.get("cache", {}), "variants": 3}}
    recipe = validate(values, "tiny")
    assert isinstance(recipe, Recipe)
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and ".readers" not in path.parts}
    with caplog.at_level(logging.INFO, "davae"):
        run = Upgrade(recipe, out, quiet, stage1=first)
        run.train_dit()
        run.folder.close()
    assert (
        f"--stage1 {first}: its autoencoder is taken along, and the cache is encoded anew (cache.variants: 2 -> 3)"
        in (caplog.text)
    )
    assert read_meta(out / "cache").items == 3 * read_meta(first / "cache").items // 2
    assert {record["stage"] for record in read_metrics(out / "metrics.jsonl")} == {"stage2"}
    before, after = (load_file(folder / "vae/diffusion_pytorch_model.safetensors") for folder in (first, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kept == {path: path.read_bytes() for path in kept}
    shutil.rmtree(first / "cache")
    again = Upgrade(recipe, out, quiet, stage1=first)  # begun, it keeps its own
    assert again.first == out
    again.folder.close()
    plain = validate(recipe_values, "tiny")
    without = Upgrade(plain, tmp_path / "third", quiet, stage1=first)  # type: ignore[arg-type]
    assert (without.first, without.why_anew) == (tmp_path / "third", "it has no whole one")
    without.folder.close()
    (first / "checkpoints" / "stage1.done").unlink()
    with pytest.raises(DataError, match="holds no run whose stage 1 is done; run `davae train-vae` there first"):
        check_shared(recipe, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"data.num_workers": 0, "cache.batch_size": 2, "stage2.lr": 0.5}, ""),
        ({"cache.dtype": "float32"}, "cache.dtype: float16 -> float32"),
        ({"data.caption_key": "title"}, "data.caption_key: None -> title"),
        ({"stage2.data": {"source": "other"}}, "data.source: "),
        ({"data.flip": True}, None),
        ({"run.seed": 5}, "run.seed: 0 -> 5"),
        ({"base.dtype": "bfloat16", "run.mixed_precision": "bf16"}, None),
    ],
)
def test_only_what_changes_stage_1_refuses(recipe_values: dict, finished: Path, changes: dict, message: str | None):
    values = copy.deepcopy(recipe_values)
    set_values(values, changes)
    recipe = validate(values, "tiny")
    assert isinstance(recipe, Recipe)
    if message is None:
        with pytest.raises(DataError, match=f"another autoencoder or data: {next(iter(changes))}: "):
            check_shared(recipe, finished)
    else:
        found = check_shared(recipe, finished)
        assert found.startswith(message) if message else not found


def test_full_fine_tuning_leaves_the_pretrained_model_alone(recipe_values: dict, tiny_base: Path, tmp_path: Path):
    recipe = validate({**recipe_values, "stage2": {**recipe_values["stage2"], "lora": None}}, "full")
    run = Upgrade(recipe, tmp_path / "full", quiet)  # type: ignore[arg-type]
    run.run()
    fresh = load_pipeline(str(tiny_base)).transformer.state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in run.base_pipeline.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("lora", "precision"), [(None, "no"), (None, "bf16"), ({"rank": 2}, "no"), ({"rank": 2}, "bf16")]
)
def test_a_held_base_starts_at_the_pretrained_prediction(
    recipe_values: dict, finished: Path, tmp_path: Path, lora: dict | None, precision: str
):
    """The frozen copy counts the silent T5's tokens as the trained model does: their predictions are equal."""
    values = copy.deepcopy(recipe_values)
    changes = {"lora": lora, "hold_base": 1.0, "max_steps": 6, "caption_dropout": 0.5}
    set_values(values, {f"stage2.{name}": value for name, value in changes.items()})
    set_values(values, {"run.mixed_precision": precision})
    run = Upgrade(validate(values, "held"), tmp_path, quiet, stage1=finished)  # type: ignore[arg-type]
    run.train_dit()
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["stage"] == "stage2"]
    first, *others = (record["loss_base"] for record in records)
    assert first == pytest.approx(0.0, abs=1e-8 if precision == "no" else 1e-4)
    assert max(others) > 1e-9  # once the detail is trained


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_stopped_run_with_a_held_base_goes_on_to_the_bit(
    recipe_values: dict, finished: Path, tmp_path: Path, lora: dict | None
):
    """The frozen copy is the model of the first step again, whatever the checkpoint holds."""
    values = copy.deepcopy(recipe_values)
    set_values(values, {"stage2.lora": lora, "stage2.hold_base": 0.5, "stage2.max_steps": 5})
    recipe = validate(values, "held")

    def stop(progress: Progress) -> None:
        if (progress.task, progress.step) == ("stage2", 3):
            os.kill(os.getpid(), signal.SIGINT)

    Upgrade(recipe, tmp_path / "whole", quiet, stage1=finished).train_dit()  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        Upgrade(recipe, tmp_path / "stopped", stop, stage1=finished).train_dit()  # type: ignore[arg-type]
    Upgrade(recipe, tmp_path / "stopped", quiet, stage1=finished).train_dit()  # type: ignore[arg-type]
    whole, stopped = (training_records(tmp_path / name) for name in ("whole", "stopped"))
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 5]
    assert stopped == whole
    mine, theirs = (load_file(tmp_path / name / "upgrade.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- bad input ---------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run the command line in this process; it must exit with 2 and one line on standard error."""
    before, sys.argv = sys.argv, ["davae", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("davae: ")]
    assert len(lines) == 1
    return lines[0]


def test_another_recipe_in_the_run_folder(recipe_file: Path, finished: Path, capsys: pytest.CaptureFixture):
    line = fails(capsys, "upgrade", str(recipe_file), "--out", str(finished), "--set", "stage1.lr=0.5")
    assert "stage1.lr: 0.0001 -> 0.5" in line
    assert "use another --out" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("detail_channels=6", "6 is not a multiple of the 4 latent channels"),
        ("base.resolution=18", "base.resolution: 18 is not divisible by 4"),
        ("base.model=/no/model", "/no/model"),
        ("stage1.crop=6", "stage1.crop: 6 is not a multiple of 4"),
        ("run.mixed_precision=float8", "run.mixed_precision"),
        ("stage1.max_step=3", "stage1.max_step: unknown key; did you mean 'max_steps'"),
        ("data.source=/no/folder", "/no/folder does not exist"),
        ("base.resolution=64", "every image is smaller than the target of 128 pixels"),
    ],
)
def test_bad_recipes(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str):
    out = tmp_path / "out"
    assert message in fails(capsys, "upgrade", str(recipe_file), "--out", str(out), "--set", override)
    assert not out.exists()  # nothing is written before everything that can be checked is checked


def test_an_upgraded_model_cannot_be_upgraded_again(
    recipe_file: Path, finished: Path, capsys: pytest.CaptureFixture, tmp_path
):
    model = f"base.model={finished / 'pipeline'}"
    assert "upgraded already" in fails(
        capsys, "upgrade", str(recipe_file), "--out", str(tmp_path / "x"), "--set", model
    )


def test_an_upgrade_of_another_shape_cannot_be_gone_on_from(
    recipe_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run_cli("export", str(finished), "--out", str(tmp_path / "up"))
    start = ("upgrade", str(recipe_file), "--set", f"init={tmp_path / 'up'}", "--out")
    assert "upgrade.safetensors does not exist" in fails(
        capsys, "upgrade", str(recipe_file), "--set", f"init={tmp_path}", "--out", str(tmp_path / "none")
    )
    line = fails(capsys, *start, str(tmp_path / "rank"), "--set", "stage2.lora.rank=3")
    assert "stage2.lora: {rank: 3, alpha: 3}" in line
    assert "{rank: 2, alpha: 2}" in line
    assert not (tmp_path / "rank" / "cache").exists()
    line = fails(capsys, *start, str(tmp_path / "channels"), "--set", "detail_channels=4")
    assert "up has 8 detail channels; set detail_channels to 8" in line
    assert not (tmp_path / "channels" / "cache").exists()


def test_empty_folder(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    line = fails(capsys, "upgrade", str(recipe_file), "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "o"))
    assert "holds no images" in line


def test_dry_run_builds_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "dry"
    run_cli("upgrade", str(recipe_file), "--out", str(out), "--dry-run")
    shown = capsys.readouterr().out
    assert "tokens native" in shown
    assert "stage2 trainable parameters" in shown
    assert not out.exists()


def test_own_pictures_with_a_broken_one_among_them(recipe_values: dict, tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, (suffix, mode) in enumerate(
        [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("jpg", "L"), ("jpg", "CMYK")]
    ):
        picture(number, 50 + number, 40).convert(mode).save(folder / f"{number}.{suffix}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    values = {**recipe_values, "data": {"source": str(folder), "holdout": 0.0}, "sampling": {"steps": 1}}
    recipe = validate(values, "mine")
    run = Upgrade(recipe, tmp_path / "out", quiet)  # type: ignore[arg-type]
    run.run()
    assert set(run.skipped) == {"broken.jpg"}
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_a_full_disk_keeps_the_last_checkpoint(recipe_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = validate(recipe_values, "tiny")
    run = Upgrade(recipe, tmp_path / "out", quiet)  # type: ignore[arg-type]
    real, calls = torch.save, []

    def full(state: object, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(RunError, match="No space left on device; the last checkpoint is whole"):
        run.train_vae()
    assert [path.name for path in run.folder.checkpoints("stage1")] == ["stage1-00000002", "stage1-00000003"]
    assert not list((tmp_path / "out" / "checkpoints").glob(".*partial"))
    state.load_checkpoint(run.folder.checkpoints("stage1")[-1])


def test_a_run_folder_serves_one_process(recipe_values: dict, tmp_path: Path):
    recipe = validate(recipe_values, "tiny")
    first = RunFolder(tmp_path, recipe)
    with pytest.raises(RunError, match="in use by another davae process"):
        RunFolder(tmp_path, recipe)
    assert first.path == tmp_path


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a").exists()

    def broken() -> None:
        with atomic_folder(tmp_path / "a") as partial:
            (partial / "x").write_text("2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_learning_rate_schedule(recipe_values: dict):
    settings = validate(
        {
            **recipe_values,
            "stage1": {"max_steps": 110, "batch_size": 1, "lr_warmup_steps": 10, "lr_schedule": "cosine"},
        },
        "x",
    ).stage1  # type: ignore[union-attr]
    rates = [learning_rate(settings, 1.0, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] < 0.001
