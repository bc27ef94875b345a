"""Several processes, engines, faults: the same losses however the batch is divided, and runs that come back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import tiny_recipe, tiny_upgrade_recipe
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from test_loop import OneWeight, train
from warm import run, run_two

import davae.recipes
from davae.errors import Interrupted, RunError
from davae.files.atomic import atomic_folder
from davae.pretrained.open import load_pipeline
from davae.pretrained.prompting import embed_captions
from davae.pretrained.shapes import read_shapes
from davae.pretrained.text_encoders import load_text_encoders, reads_silent_t5
from davae.recipes import validate
from davae.recipes.sections import Optim, Run, Stage1
from davae.runs.report import run_with_report
from davae.runs.upgrade import Upgrade
from davae.train import run_folder as state
from davae.train.accelerator import make_accelerator
from davae.train.ema import Average
from davae.train.monitor import RunWarnings, StepTimer
from davae.train.random import SampleRandom
from davae.train.ready import check_trainings
from davae.train.run_folder import RunFolder, newest_checkpoint, read_metrics
from davae.train.shares import Share, share_of_step

CONFIGS = Path(davae.recipes.__file__).parent / "accelerate"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def quiet(progress: object) -> None:
    pass


# -- one batch, any number of processes ----------------------------------------------------------------------------


def test_one_process_runs_one_precision_after_the_other() -> None:
    """A table's rows may differ in it."""
    for precision in ("no", "bf16", "no"):
        assert make_accelerator(Run(mixed_precision=precision)).mixed_precision == precision


def test_noise_hangs_on_the_place_in_the_global_batch():
    whole = SampleRandom(3, "stage1", 7, 0, 6)
    parts = [SampleRandom(3, "stage1", 7, place, 2) for place in (0, 2, 4)]
    values = [(d.uniform(), d.normal(2, 3)) for d in (whole, *parts)]
    for number, value in enumerate(values[0]):
        assert torch.equal(value, torch.cat([v[number] for v in values[1:]]))
        assert len(value.flatten().unique()) == value.numel(), "no two samples share their noise"
    shared = [torch.rand(3, generator=d.batch) for d in (whole, *parts)]
    assert all(torch.equal(shared[0], other) for other in shared[1:])
    others = [
        SampleRandom(4, "stage1", 7, 0, 6),
        SampleRandom(3, "stage2", 7, 0, 6),
        SampleRandom(3, "stage1", 8, 0, 6),
    ]
    assert not any(torch.equal(values[0][0], other.uniform()) for other in others)


def test_a_batch_that_cannot_be_divided_is_told():
    assert share_of_step(Stage1(max_steps=1, batch_size=8), "stage1", 4) == Share(2, 1)
    with pytest.raises(RunError, match=r"stage1\.batch_size: the global batch of 10 cannot .* 4 processes; use 8"):
        share_of_step(Stage1(max_steps=1, batch_size=10), "stage1", 4)


def train_dit(recipe: Path, out: Path) -> list[str]:
    return ["-m", "davae", "train-dit", str(recipe), "--out", str(out)]


# in stage 1 rounding alone grows to this in 20 steps; in float64 it is looked at closely
TOLERANCE = {"stage1": 2e-2, "stage2": 1e-5}
NAMES = {"loss", "l1", "lpips", "align", "adversarial", "discriminator", "loss_base", "loss_detail", "grad_norm_lora"}


def close(one: Path, two: Path, stage: str) -> None:
    """The same losses at each of 20 steps."""
    mine, theirs = (
        {r["step"]: r for r in read_metrics(out / "metrics.jsonl") if r["stage"] == stage} for out in (one, two)
    )
    assert list(mine) == list(theirs) == list(range(1, 21))
    compared = {name for name in NAMES if name in mine[20]}
    far = {
        (step, name): (mine[step][name], theirs[step][name])
        for step in mine
        for name in compared & mine[step].keys()
        if abs(mine[step][name] - theirs[step][name]) > TOLERANCE[stage] * max(1, abs(mine[step][name]))
    }
    assert len(compared) >= 4
    assert not far


def same_report(one: Path, two: Path) -> None:
    """The figures of both reports, but for times and rounding; the same number of files, none of them left half."""
    mine, theirs = (json.loads((out / "report.json").read_text()) for out in (one, two))
    assert mine.keys() == theirs.keys()
    assert len(mine["reconstruction"]) == len(theirs["reconstruction"]) > 1
    for own, other in zip(mine["reconstruction"], theirs["reconstruction"], strict=True):
        assert own.keys() == other.keys()
        assert (own["name"], own["pictures"]) == (other["name"], other["pictures"])
        assert own["psnr"] == pytest.approx(other["psnr"], rel=1e-2)
    for name in ("tokens", "pixels"):
        assert [row[name] for row in mine["speed"]] == [row[name] for row in theirs["speed"]]
    ours, others = ({p.name for p in out.iterdir()} for out in (one, two))
    assert others - ours == {"log.txt"}, "the command line alone keeps a log"
    assert ours <= others
    assert not [p for p in two.rglob("*") if ".partial" in p.name]


@pytest.fixture(scope="module")
def runs(tiny_base: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One process over 20 steps of both stages; and its recipe's file."""
    place = tmp_path_factory.mktemp("engines")
    changes = {f"stage{n}__{name}": value for n in (1, 2) for name, value in {"max_steps": 20, "lr": 1e-5}.items()}
    values = tiny_upgrade_recipe(tiny_base, picture_folder, **changes, stage1__gan_lr=1e-5, run__keep_every=10)
    (place / "tiny.yaml").write_text(yaml.safe_dump(values))
    Upgrade(validate(values, "tiny"), place / "one", quiet).run()  # type: ignore[arg-type]
    return place / "tiny.yaml", place / "one"


def test_two_processes_give_the_losses_of_one(runs: tuple[Path, Path], tmp_path: Path):
    recipe, one = runs
    two = tmp_path / "two"
    run_two(["-m", "davae", "upgrade", str(recipe), "--out", str(two)], tmp_path / "log")
    close(one, two, "stage1")
    alone = Upgrade(validate(yaml.safe_load(recipe.read_text()), "tiny"), one, quiet)  # type: ignore[arg-type]
    same_report(run_with_report(alone, quiet).parent, two)
    values = validate(yaml.safe_load(recipe.read_text()), "tiny")
    Upgrade(values, tmp_path / "again", quiet, stage1=two).train_dit()  # type: ignore[arg-type]  # on the same cache
    close(tmp_path / "again", two, "stage2")


def test_two_processes_are_one_but_for_rounding(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    """Stage 1 with its discriminator and both adaptive weights in float64, at a learning rate that moves everything."""
    values = tiny_upgrade_recipe(
        tiny_base, picture_folder, stage1__max_steps=20, stage1__lr=1e-4, stage1__gan_lr=1e-4
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    script, outs = str(Path(__file__).parents[1] / "in_float64.py"), [tmp_path / "one", tmp_path / "two"]
    run([script, str(tmp_path / "tiny.yaml"), str(outs[0])], tmp_path / "log")
    run_two([script, str(tmp_path / "tiny.yaml"), str(outs[1])], tmp_path / "log")
    one, two = (json.loads((out / "values.json").read_text()) for out in outs)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["values"]) == 20 + 19, "two players but for the first step"
    assert len({turn.get("adversarial_weight") for turn in one["values"]}) > 19
    for mine, theirs in zip(one["values"], two["values"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_fsdp2_goes_on_where_one_process_stopped(runs: tuple[Path, Path], tmp_path: Path):
    """Another engine and another number of processes: the rest of the epoch, no sample twice, the same pipeline."""
    recipe, one = runs
    out = tmp_path / "fsdp"
    shutil.copytree(one, out)
    shutil.rmtree(out / "pipeline")
    (out / "upgrade.safetensors").unlink()
    for name in ("stage2.done", "stage2-00000018", "stage2-00000020"):
        path = out / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (
        newest_checkpoint(RunFolder(out, validate(yaml.safe_load(recipe.read_text()), "x")), "stage2")["step"] == 10
    )
    run_two(train_dit(recipe, out), tmp_path / "log", **FSDP)
    close(one, out, "stage2")
    mine, theirs = (load_file(p / "upgrade.safetensors") for p in (out, one))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-5
    whole = load_pipeline(str(out / "pipeline")).transformer
    assert type(whole).__name__ == "SD3Transformer2DModel"


# -- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_configs(file: Path):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no", "the recipe decides"
    if "zero" in file.stem:
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
        assert config.deepspeed_config["gradient_clipping"] == Optim(max_steps=1, batch_size=1).max_grad_norm
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


# -- average and optimizers ----------------------------------------------------------------------------------------


def test_average_is_diffusers_average():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    mine, theirs = Average({"w": weight}, 0.5), EMAModel([weight], decay=0.5)
    for _ in range(6):
        weight.data += torch.randn(3, 4)
        mine.step()
        theirs.step([weight])
        torch.testing.assert_close(mine.shadow["w"], theirs.shadow_params[0])
    again = Average({"w": weight}, 0.5, torch.device("cpu"))
    again.load_state_dict(mine.state_dict())
    again.copy_to_parameters()
    assert torch.equal(weight.data, mine.shadow["w"])


def test_packages_of_trainings_are_looked_for_before_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = Optim(max_steps=1, batch_size=1, optimizer="adamw-8bit")
    with pytest.raises(
        RunError, match=r"stage2.optimizer: adamw-8bit needs bitsandbytes; `pip install bitsandbytes`"
    ):
        check_trainings({"stage1": settings.model_copy(update={"optimizer": "adamw"}), "stage2": settings}, Run())
    with pytest.raises(RunError, match=r"run.trackers: wandb is not installed; `pip install wandb`"):
        check_trainings({}, Run(trackers=("wandb",)))


def test_batches_of_trainings_are_divided_before_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("davae.train.ready.ranks", lambda: 3)
    settings = Optim(max_steps=1, batch_size=4)
    with pytest.raises(RunError, match="stage2"):
        check_trainings({"stage1": settings.model_copy(update={"batch_size": 3}), "stage2": settings}, Run())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused"])
def test_a_bad_step_moves_nothing(tmp_path: Path, optimizer: str):
    """A fused optimizer skips on the device; the weights are those of a run without the bad step's update."""
    weights = {}
    for name, bad in {"bad": {1}, "good": set()}.items():
        task = train(tmp_path / optimizer / name, 4 if bad else 3, bad, optimizer)
        weights[name] = task.weight.weight.detach()
    torch.testing.assert_close(weights["bad"], weights["good"])


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_broken_checkpoint_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path, 6, set())
    files = [tmp_path / "checkpoints" / f"one-{step:08d}" / "state.pt" for step in (4, 6)]
    damaged = bytearray(files[1].read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    files[1].write_bytes(damaged)
    whole = train(tmp_path / "other", 8, set())
    again = train(tmp_path, 8, set())
    assert "one-00000006 cannot be read" in caplog.text
    assert "going back to the one before" in caplog.text
    assert (tmp_path / "checkpoints" / "broken-one-00000006").is_dir()
    assert torch.equal(whole.weight.weight, again.weight.weight)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    for path in (tmp_path / "checkpoints").glob("one-*/state.pt"):
        path.write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"one-00000008 cannot be read: .* and none before it; use a new --out"):
        train(tmp_path, 10, set())


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path):
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("1")
    (tmp_path / "a").rename(tmp_path / ".a.old")  # what a kill inside atomic_folder leaves
    (tmp_path / ".a.partial").mkdir()
    state.put_back(tmp_path)
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_a_preemption_signal_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def loss(self: Any, player: str, batch: Any, step: int, draws: object) -> tuple[torch.Tensor, dict]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        value = self.weight.weight.square().sum()
        return value, {"loss": value.detach()}

    monkeypatch.setattr(OneWeight, "loss", loss)
    with pytest.raises(Interrupted, match="one: stopped at step 3 of 9, saved"):
        train(tmp_path, 9, set())
    assert (tmp_path / "checkpoints" / "one-00000003").is_dir()


def test_other_processes_of_a_launch_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = RunFolder(tmp_path, tiny_recipe())
    monkeypatch.setattr(state, "is_main", lambda: False)
    RunFolder(tmp_path, tiny_recipe())
    monkeypatch.undo()
    with pytest.raises(RunError, match="in use by another davae process"):
        RunFolder(tmp_path, tiny_recipe())
    first.close()


# -- what a run says of itself -------------------------------------------------------------------------------------


def test_warnings_name_their_cause_once(caplog: pytest.LogCaptureFixture):
    watch = RunWarnings("stage2", 0, 0)
    for _ in range(2):
        watch.times({"seconds_data": 0.5, "seconds_step": 1.0})
    watch.times({"seconds_data": 0.1, "seconds_step": 1.0})
    for _ in range(RunWarnings.DEAD):
        watch.gradients({"grad_norm_P'": 0.1, "grad_norm_O'": 0.0, "detail_weight": 0.0})
    assert "O'" not in caplog.text, "w(n) is zero at first: that is no fault"
    for _ in range(RunWarnings.DEAD):
        watch.gradients({"grad_norm_P'": 0.1, "grad_norm_O'": 0.0, "detail_weight": 0.5})
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert "50 % of a step is spent waiting for data; raise data.num_workers (now 0)" in messages[0]
    assert "the gradient of O' is exactly zero at 5 logged steps in a row" in messages[1]


def test_the_parts_of_a_step_add_up():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.phase("data"):
            sum(range(10000))
        with timer.phase("forward"):
            sum(range(10000))
        timer.steps += 1
    figures = timer.read()
    assert 0 < figures["seconds_data"] + figures["seconds_forward"] <= figures["seconds_step"]
    assert figures["seconds_backward"] == 0


def test_validation_samples_and_the_best_checkpoint(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    values = tiny_upgrade_recipe(
        *(tiny_base, picture_folder), data__holdout=0.3, stage2__max_steps=6, stage2__validate_every=2,
        run__sample_every=3, run__keep_checkpoints=1, run__ema_device="cpu",
    )  # fmt: skip
    Upgrade(validate(values, "tiny"), tmp_path, quiet).run()  # type: ignore[arg-type]
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["stage"] == "stage2"]
    validated = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    assert list(validated) == [2, 4, 6]
    assert all({"grad_norm_P'", "grad_norm_O'", "grad_norm_lora", "grad_norm_rest"} <= r.keys() for r in records)
    best = json.loads((tmp_path / "checkpoints" / "stage2-best.json").read_text())["step"]
    assert validated[best] == min(validated.values())
    kept = {path.name for path in (tmp_path / "checkpoints").glob("stage2-0*")}
    assert kept == {"stage2-00000006", f"stage2-{best:08d}"}
    assert sorted(p.name for p in (tmp_path / "progress").iterdir()) == [
        "stage1-00000003.png", "stage2-00000003.png", "stage2-00000006.png",
    ]  # fmt: skip
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert {"seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer", "memory_gib"} <= timing[
        -1
    ].keys()


def test_prompts_are_embedded_without_the_transformer(tiny_base: Path):
    """Also where the pipeline asks it for the width of an absent T5."""
    folder = str(tiny_base)
    assert reads_silent_t5(folder)
    shapes = read_shapes(folder)
    alone, whole = load_text_encoders(folder, "transformer", shapes.transformer_config), load_pipeline(folder)
    assert not isinstance(alone.transformer, torch.nn.Module)
    for _ in range(2):
        mine, theirs = (embed_captions(p, ["a red square", ""], shapes.transformer_class) for p in (alone, whole))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        alone.text_encoder_3 = whole.text_encoder_3 = None
