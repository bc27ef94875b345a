"""The phases of a dry run: memory, disk, time, and what to change where one does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from davae.cli import app
from davae.cost.flops import meta_detail_vae
from davae.cost.memory import TrainingStep, encode_bytes
from davae.dataset.encoding import report_precision
from davae.errors import DataError, RecipeError
from davae.latent import LatentLayout
from davae.plan.dry_run import on_hardware, plan
from davae.plan.phase_remedies import check_phase, disk_notes, text_notes
from davae.plan.phase_sizes import RESERVED, ImageFacts, Phase, PhaseSizes, TextFacts, count_images, is_here
from davae.plan.phases import (
    DrawingBytes,
    cache_phase,
    export_phase,
    polish_phase,
    report_phase,
    stage1_phase,
    stage2_phase,
)
from davae.pretrained.memory_budget import Halving, is_out_of_memory, largest_batch
from davae.pretrained.shapes import read_shapes
from davae.recipes import Recipe, load_recipe
from davae.recipes.hardware import GIB
from davae.recipes.loading import differences
from davae.recipes.sections import Cache
from davae.train.locking import keep_origin
from davae.train.shares import Share
from davae.zoo import resolve

NAMES = ["stage1", "cache", "stage2", "export", "report", "sampling"]
SMALL = [
    "stage1.lambda_lpips=0",
    "stage1.batch_size=2",
    "stage2.batch_size=2",
    "base.resolution=32",
    "data.limit=10",
]


def recipe(*overrides: str, name: str = "micro") -> Recipe:
    found = load_recipe(name, overrides)
    assert isinstance(found, Recipe)
    return found


def sizes(*overrides: str, **changes: Any) -> PhaseSizes:
    """Those of the embedded model, training rehearsals aside."""
    chosen = recipe(*SMALL, *overrides)
    shapes = read_shapes(resolve("micro"))
    step = TrainingStep(weights=GIB, gradients=GIB // 2, optimizer=GIB, ema=GIB // 2, activations=GIB, flops=1e12)
    facts = PhaseSizes(
        recipe=chosen,
        shapes=shapes,
        layout=LatentLayout(shapes.channels, 16),
        step1=step,
        step2=step,
        text=TextFacts(1000, 1e9, 500, 400, 100),
        images=ImageFacts(10, True),
        transformer=5000,
        trained=100,
        base_vae=300,
        detail_vae=400,
        encode_flops=1e9,
        decode_flops=2e9,
        upgraded_flops=3e9,
        native_flops=9e9,
        share1=Share(2, 1),
        share2=Share(4, 2),
    )
    return replace(facts, **changes)


# -- the contract ----------------------------------------------------------------------------------------------


def test_a_dry_run_writes_and_prints_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for stage in ("stage1_memory", "stage2_memory"):  # their rehearsals have tests of their own
        monkeypatch.setattr(f"davae.plan.dry_run.{stage}", lambda *_, **__: sizes().step1)
    monkeypatch.setattr("davae.plan.phases.drawing_bytes", lambda *_, **__: DrawingBytes(GIB, GIB))
    file = tmp_path / "sub" / "plan.json"
    overrides = [word for value in SMALL for word in ("--set", value)]
    shown = CliRunner().invoke(app, ["upgrade", "micro", "--dry-run", "--json", str(file), *overrides])
    assert shown.exit_code == 0, shown.output
    values = json.loads(file.read_text())
    assert [phase["name"] for phase in values["phases"]] == NAMES
    for phase in values["phases"]:
        assert phase["fits"] is True
        assert phase["remedy"] == ""
        assert all(phase[key] >= 0 for key in ("device_gib", "host_gib", "machine_gib", "disk_gib", "hours"))
        assert phase["name"] in shown.output
    assert (values["gpu"], values["gpus"], values["gpu_gib"]) == ("h100-80gb", 1, 80.0)
    assert values["stage1_parameters"] > 0, "the figures of before stay"
    assert "fits" in shown.output
    assert "GiB left" not in shown.output
    by_name = {phase["name"]: phase for phase in values["phases"]}
    assert by_name["cache"]["batch_size"] == 16
    assert by_name["export"]["device_gib"] == 0
    assert by_name["stage2"]["device_gib"] > 0
    for stage in ("stage1", "stage2"):  # both tables state one figure
        assert values[f"{stage}_memory_gib"] == by_name[stage]["device_gib"]
        assert values[f"{stage}_rest_of_pipeline_gib"] < 0.5, "no idle part of the pipeline"


def test_a_polish_is_a_phase_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = replace(sizes().step1, flops=3e12, gradients=GIB // 4)
    for stage, found in (("stage1", sizes().step1), ("polish", step), ("stage2", sizes().step1)):
        monkeypatch.setattr(f"davae.plan.dry_run.{stage}_memory", lambda *_, found=found, **__: found)
    monkeypatch.setattr("davae.plan.phases.drawing_bytes", lambda *_, **__: DrawingBytes(GIB, GIB))
    polish = "stage1.polish={max_steps: 7, batch_size: 3}"
    overrides = [word for value in (*SMALL, polish) for word in ("--set", value)]
    file = tmp_path / "plan.json"
    shown = CliRunner().invoke(app, ["upgrade", "micro", "--dry-run", "--json", str(file), *overrides])
    assert shown.exit_code == 0, shown.output
    values = json.loads(file.read_text())
    phases = {phase["name"]: phase for phase in values["phases"]}
    assert list(phases) == ["stage1", "cache", "stage1.polish", *NAMES[2:]]
    assert values["stage1_polish_memory_gib"] == phases["stage1.polish"]["device_gib"] > 0
    assert values["stage1_polish_petaflops"] == pytest.approx(3e12 * 7 / 1e15)
    chosen = sizes(polish, polish_step=step, polish_share=Share(3, 1))
    own = polish_phase(chosen)
    assert own.seconds / stage1_phase(chosen).seconds == pytest.approx(3 * 7 / chosen.recipe.stage1.max_steps)
    checkpoint = step.optimizer + step.gradients + step.ema
    assert own.disk == (2 + 2) * checkpoint + 4 * 400, "its checkpoints, and a second DetailVAE"
    large = check_phase(replace(own, device=10**15), chosen)
    assert (
        large.remedy == "lower stage1.polish.batch_size, or set stage1.polish.crop=32, or take a GPU with more memory"
    )


def test_json_without_a_dry_run_is_one_line(tmp_path: Path):
    from davae.commands.upgrade import upgrade_verb as verb

    with pytest.raises(RecipeError, match=r"--json: .*add --dry-run"):
        verb("micro", out=tmp_path / "run", json=tmp_path / "x.json")
    assert not (tmp_path / "run").exists()


# -- what each phase counts ------------------------------------------------------------------------------------


def test_training_counts_what_lies_on_the_device_and_the_copies_of_a_machine():
    one = stage2_phase(sizes())
    held = one.device - sizes().step2.peak
    assert held == 4 * 4 * 400, "a pass's prompt embeddings in float32, and no idle part of the pipeline"
    validated = stage2_phase(sizes("stage2.validate_every=1"))
    assert validated.device - one.device == 4 * 400, "the detail VAE"
    moved = stage2_phase(sizes("run.ema_device=cpu"))
    assert one.device - moved.device == GIB // 2
    assert moved.host - one.host == GIB // 2
    eight = stage2_phase(replace(sizes(), recipe=sizes().recipe.model_copy(update={"hardware": hardware(8)})))
    assert eight.host == one.host
    assert eight.machine < 8 * one.host, "one copy a machine"
    assert eight.machine - one.host == 7 * (one.host - 2 * GIB), (
        "the checkpoint of 2 GiB is the first process's alone"
    )
    assert one.disk == (2 + 2) * 2 * GIB
    assert stage2_phase(sizes("run.keep_every=100")).disk == (2 + 2 + 46) * 2 * GIB


def test_the_report_has_a_precision_of_its_own(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(
        "davae.plan.phases.drawing_bytes", lambda s, **_: asked.append(s.precision) or DrawingBytes(GIB, GIB)
    )
    monkeypatch.setattr("davae.plan.phases.encoding_bytes", lambda s: asked.append(s.precision) or GIB)
    for dtype, expected in ((None, torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        asked.clear()
        chosen = sizes("run.mixed_precision=fp16", f"report.dtype={dtype or 'null'}")
        report_phase(chosen)
        assert set(asked) == {expected} == {report_precision(chosen.recipe)}
        assert chosen.precision == torch.float16, "of the other phases"
    plain, other = recipe(*SMALL), recipe(*SMALL, "report.dtype=float32")
    assert not differences(plain, other), "it may change on a run that exists"


def test_text_encoders_of_the_step_pass_through_main_memory():
    """SD3.5's take twice the transformer."""
    large = {"text": TextFacts(GIB, 1e9, 500, 400, 100)}
    stored, step = stage2_phase(sizes(**large)), stage2_phase(sizes("cache.text=step", **large))
    assert step.host - stored.host == 4 * GIB - 2 * GIB, "more than the checkpoint of 2 GiB"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_whether_a_stage_fits_is_what_the_table_has(stage: str):
    facts = sizes(recipe=sizes().recipe.model_copy(update={"hardware": hardware(1)}))
    for device in (facts.budget, facts.budget + 1):
        phase = check_phase(Phase(stage, device=device), facts)
        shown = on_hardware(stage, facts, device)[f"{stage}_fits"]
        assert shown.startswith("fits h100") == phase.fits
        assert phase.remedy in shown


def hardware(count: int, **changes: Any) -> Any:
    from davae.recipes.sections import Hardware

    return Hardware(gpu="h100-80gb", count=count, **changes)


def test_the_export_follows_its_dtype():
    full, half = export_phase(sizes()), export_phase(sizes("export.dtype=bfloat16"))
    values = 1000 + 5000 + 400
    assert full.disk == 4 * values + 4 * 100
    assert half.disk == 2 * values + 4 * 100
    assert half.host == full.host  # read in float32, converted before it is written


def test_the_cache_counts_images_and_prompts():
    stored = cache_phase(sizes())
    latents = 10 * 16 * (24 * 8 * 8) * 2  # images, variants, values, bytes
    assert stored.disk == latents + 10 * 100 * 2
    step = cache_phase(sizes("cache.text=step"))
    assert stored.disk - step.disk == 10 * 100 * 2
    assert stage2_phase(sizes("cache.text=step")).seconds > stage2_phase(sizes()).seconds
    figures, notes = text_notes(sizes())
    assert figures["text_cache_gib"] * 4 == pytest.approx(figures["text_cache_padded_gib"], abs=1e-3)
    assert "cache.text=step" in notes[0]
    assert text_notes(sizes(text=TextFacts())) == ({}, [])


def test_images_are_coded_in_the_runs_precision_and_as_many_as_fit():
    shapes = read_shapes(resolve("micro"))
    full, half = (
        encode_bytes(meta_detail_vae(shapes, 16, 2), 64, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half == pytest.approx(full / 2, rel=0.1)
    assert cache_phase(sizes("run.mixed_precision=bf16")).device < 0.6 * cache_phase(sizes()).device
    assert report_phase(sizes("report.batch_size=2")).device < report_phase(sizes()).device


def test_batches_are_halved_until_they_fit():
    assert [largest_batch(10, budget, 16) for budget in (1000, 160, 159, 20, 5)] == [16, 16, 8, 2, 1]


# -- fits and remedies -----------------------------------------------------------------------------------------


def named(name: str, found: PhaseSizes) -> Phase:
    make = {
        "stage1": stage1_phase,
        "cache": cache_phase,
        "stage2": stage2_phase,
        "export": export_phase,
        "report": report_phase,
    }[name]
    return check_phase(make(found), found)


def test_what_does_not_fit_names_the_remedy():
    step = replace(sizes().step2, activations=80 * GIB - RESERVED)
    found = named("stage2", sizes(step2=step))
    assert not found.fits
    for way in ("base.dtype=bfloat16", "stage2.gradient_checkpointing=true", "lower stage2.batch_size"):
        assert way in found.remedy
    tuned = sizes("stage2.lora=null", step2=step, share2=Share(1, 8))
    assert "FSDP2" in named("stage2", tuned).remedy
    assert "base.dtype" not in named("stage2", tuned).remedy
    assert "stage1.crop=32" in named("stage1", sizes(step1=step)).remedy
    heavy = named("stage2", sizes(step2=replace(step, weights=90 * GIB))).remedy
    assert "base.dtype=bfloat16" in heavy
    assert not any(way in heavy for way in ("lower stage2.batch_size", "gradient_checkpointing"))
    assert "base.dtype=bfloat16" in named("cache", sizes(text=TextFacts(10**11, 1.0, 1, 1, 1))).remedy


def test_prompts_that_are_embedded_in_the_step_can_be_stored_where_the_disk_has_room():
    text = TextFacts(3 * 10**10, 1.0, 1, 400, 10**8)  # 10 images: 2 to 4 GB
    assert "set cache.text=stored (" in named("stage2", sizes("cache.text=step", text=text)).remedy
    assert "lower stage2.batch_size" not in named("stage2", sizes("cache.text=step", text=text)).remedy
    small = sizes("cache.text=step", text=text)
    small = replace(small, recipe=small.recipe.model_copy(update={"hardware": hardware(1, disk_gib=1)}))
    assert "cache.text=stored" not in named("stage2", small).remedy


@pytest.mark.parametrize(
    ("limit", "phase", "words"), [("host_gib", "export", "main memory"), ("disk_gib", "stage2", "keep")]
)
def test_machines_and_disks_that_a_recipe_states_are_checked(limit: str, phase: str, words: str):
    base = sizes(transformer=10**9)
    small = base.recipe.model_copy(update={"hardware": hardware(1, **{limit: 4})})
    assert named(phase, base).fits
    found = named(phase, replace(base, recipe=small))
    assert not found.fits
    assert words in found.remedy


def test_the_disk_of_a_run_is_the_sum_of_its_phases():
    """Each phase fits a disk of 4 GiB alone, and not behind the ones before it."""
    phase, small = Phase("cache", disk=3 * GIB), sizes()
    small = replace(small, recipe=small.recipe.model_copy(update={"hardware": hardware(1, disk_gib=4)}))
    assert check_phase(phase, small).fits
    found = check_phase(phase, small, before=2 * GIB)
    assert not found.fits
    assert found.remedy.startswith("set cache.text=step, or set cache.variants=1")
    tidy = replace(small, recipe=small.recipe.model_copy(update={"cache": Cache(text="step")}))
    assert check_phase(phase, tidy, before=2 * GIB).remedy == "lower data.limit, or take more disk"


def test_a_disk_without_room_is_one_line_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    phases = [Phase("stage1", disk=1 * GIB), Phase("cache", disk=5 * GIB)]
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=6 * GIB))
    assert disk_notes(phases, tmp_path / "a" / "run") == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=6 * GIB - 1))
    (line,) = disk_notes(phases, tmp_path / "a" / "run")
    assert line.startswith(f"{tmp_path}/a/run: the run takes 6.0 GiB of disk, 5.0 of them for its cache")


def test_a_base_in_half_precision_needs_a_run_in_half_precision():
    with pytest.raises(RecipeError, match=r"base\.dtype is bfloat16 .*set run\.mixed_precision to bf16"):
        recipe("base.dtype=bfloat16")
    assert recipe("base.dtype=bfloat16", "run.mixed_precision=bf16").base.dtype == "bfloat16"


def test_images_are_counted_where_they_are(tmp_path: Path):
    assert count_images(recipe("data.source=nowhere").data, 64) == ImageFacts(500_000, False)
    assert count_images(recipe("data.source=nowhere", "data.limit=100").data, 64) == ImageFacts(90, True)
    for number in range(4):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    assert count_images(recipe(f"data.source={tmp_path}", "data.holdout=0").data, 64) == ImageFacts(4, True)
    assert count_images(recipe("data.source=nowhere").data, 64, found=10) == ImageFacts(9, True), "not opened again"


def test_data_is_here_by_the_names_that_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folders may have names like patterns, and hub datasets names like `openmoji`."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos [2024]", "a{b,c}", "plain"):
        Path(name).mkdir()
    (tmp_path / "plain" / "01.tar").touch()
    assert all(map(is_here, ("photos [2024]", "a{b,c}", "plain", "plain/*.tar", "plain/{01,02}.tar", "openmoji-all")))
    assert not any(
        map(is_here, ("openmoji-team/photos", "photos [2025]", "plain/x.tar", "hf://a/*.tar", "pipe:cat *"))
    )


class Looked(Exception):
    """Raised after the checks of a dry run."""


def test_data_that_is_here_is_refused_as_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def looked(*sizes: object) -> None:
        raise Looked(f"{sizes[-1]} images")

    monkeypatch.setattr("davae.plan.dry_run.recipe_sizes", looked)
    square, flat, empty = (tmp_path / name for name in ("square", "flat", "empty"))
    for folder, size in ((square, (150, 150)), (flat, (300, 120))):
        folder.mkdir()
        for number in range(2):
            Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    empty.mkdir()
    own, shown = f"data.source={square}", ("data.require_captions=false", "data.buckets.max_ratio=4")
    for name, changes, verb, error, message in (
        ("micro", (own,), "upgrade", DataError, "2 of 2 images have no caption"),
        ("micro", (own,), "train-vae", Looked, "^2 images"),  # which reads none
        ("micro", (own, f"stage2.data.source={tmp_path / 'not-here'}"), "upgrade", Looked, "None images"),
        ("clothing", (own,), "upgrade", DataError, "a class-conditional model needs a class for every image"),
        ("micro", (own, "base.resolution=96"), "train-vae", DataError, "smaller than the target of 192 pixels"),
        ("micro", (f"data.source={empty}",), "train-vae", DataError, "holds no images"),
        ("micro", (f"cache.shards={square}",), "upgrade", DataError, "they train class-conditional models"),
        ("micro", (f"data.source={flat}", *shown), "upgrade", Looked, "^2 images"),
        (
            "micro",
            (f"data.source={flat}", *shown, "run.sample_every=1"),
            "upgrade",
            RecipeError,
            "none fills 128 x 128",
        ),
    ):
        with pytest.raises(error, match=message):
            plan(recipe(*changes, name=name), tmp_path / "run", verb)
    assert not (tmp_path / "run").exists()


def test_a_shared_stage_1_is_compared_with_the_recipe_as_it_is_written(monkeypatch: pytest.MonkeyPatch):
    def looked(compared: Any, folder: Path) -> None:
        raise Looked(compared.base.model)

    monkeypatch.setattr("davae.plan.dry_run.check_shared", looked)
    with pytest.raises(Looked, match=r"^models/sd35-medium$"):  # not here, so its shapes are the preset's
        plan(recipe("base.model=models/sd35-medium", name="sd35-medium-1k"), stage1=Path("run"))


def test_a_dry_run_goes_on_with_the_run_that_an_earlier_command_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def looked(compared: Any, folder: Path) -> None:
        raise Looked(str(folder))

    (tmp_path / "run" / "checkpoints" / "stage2-00000001").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    keep_origin(tmp_path / "run", tmp_path / "other")
    monkeypatch.setattr("davae.plan.dry_run.check_shared", looked)
    with pytest.raises(Looked, match=r"other$"):
        plan(recipe(), tmp_path / "run")


def test_a_folder_still_to_be_made_is_read_from_what_makes_it():
    from davae.plan.dry_run import with_known_base

    found, note = with_known_base(recipe(name="imagenette128-gpu"))
    assert found.base.train is not None
    assert "read from the recipe imagenette64-gpu" in note
    found, note = with_known_base(recipe(name="imagenet512-lightningdit-xl"))
    assert found.base.model == "lightningdit-xl"
    assert "preset" in note
    assert with_known_base(recipe()) == (recipe(), "")


# -- out of memory ---------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture):
    seen: list[int] = []
    tiles: list[bool] = []

    def work(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(images) > 2 or (len(images) > 1 and not tiles):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return images * 2

    images = torch.arange(11.0)
    halving = Halving("latent cache", 8, lambda: tiles.append(True))
    assert torch.equal(halving(work, images), images * 2)
    assert seen == [8, 4, 2, *[1] * 11]
    assert halving.size == 1
    assert not tiles, "one image fitted whole"
    assert "latent cache: out of memory (CUDA out of memory" in caplog.text
    assert "with 4 images at a time" in caplog.text


def test_one_image_that_does_not_fit_goes_in_tiles_once(caplog: pytest.LogCaptureFixture):
    tiles: list[bool] = []

    def work(images: torch.Tensor) -> torch.Tensor:
        if not tiles:
            raise torch.OutOfMemoryError("none left")
        return images

    assert Halving("x", 1, lambda: tiles.append(True))(work, torch.ones(3)).tolist() == [1, 1, 1]
    assert tiles == [True]
    assert "one by one, in tiles" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        Halving("x", 4)(lambda images: work(images) if tiles.clear() is None else images, torch.ones(3))
    with pytest.raises(RuntimeError, match="else"):
        Halving("x", 4)(lambda images: (_ for _ in ()).throw(RuntimeError("else")), torch.ones(3))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
