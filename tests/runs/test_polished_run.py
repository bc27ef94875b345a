"""`stage1.polish` in a run: from start to report, stopped in its middle, added later, shared; and nothing of it when off."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import tiny_autoencoder, tiny_upgrade_recipe
from safetensors.torch import load_file

from davae.analyze.gap import decoder_before_polish
from davae.data.latent_cache.meta import read_meta
from davae.errors import Interrupted, RunError
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.open import load_pipeline
from davae.publish.upgrade_file import find_upgrade
from davae.recipes import Recipe, validate
from davae.runs import upgrade_parts
from davae.runs.report import run_with_report
from davae.runs.status import read_status
from davae.runs.upgrade import Upgrade
from davae.runs.upgrade_parts import polished_alike
from davae.sample.open import open_autoencoder
from davae.train.loop import Progress
from davae.train.run_folder import read_metrics
from davae.vae.detail_vae import DetailVAE

Start = Callable[..., Upgrade]
POLISH = {"stage1__polish": {"max_steps": 4}}


@pytest.fixture(scope="module")
def start(tiny_base: Path, picture_folder: Path) -> Start:
    """Return a function that opens a run of two steps a stage."""

    def opened(out: Path, seen: list[str] | None = None, stage1: Path | None = None, **changes: object) -> Upgrade:
        short = {"stage1__max_steps": 2, "stage2__max_steps": 2, "stage2__accumulation": 1, "sampling__steps": 1}
        recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder, **{**short, **changes}), "tiny")
        assert isinstance(recipe, Recipe)
        return Upgrade(recipe, out, lambda p: None if seen is None else seen.append(p.task), stage1=stage1)

    return opened


def finish(run: Upgrade, report: bool = False) -> Path:
    try:
        return run_with_report(run, run.observer) if report else run.run()
    finally:
        run.folder.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str = "") -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(part))


def transformer(run: Path) -> dict[str, torch.Tensor]:
    return weights(run / "pipeline" / "transformer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("polish")


@pytest.fixture(scope="module")
def whole(start: Start, folders: Path) -> Path:
    """Return a run with a polish from its start to its report."""
    seen: list[str] = []
    finish(start(folders / "whole", seen, run__sample_every=2, **POLISH), report=True)
    trainings = list(dict.fromkeys(name for name in seen if name.startswith("stage")))
    assert trainings == ["stage1", "stage1.polish", "stage2"]
    return folders / "whole"


def test_from_start_to_report_then_interrupted_and_resumed(start: Start, whole: Path, folders: Path):
    before, after, exported = (weights(whole / name) for name in ("vae", "polished", "pipeline/vae"))
    for frozen in ("base_encoder", "detail_encoder"):
        assert same(before, after, frozen)
    assert not same(before, after, "decoder.")
    assert same(after, exported)
    records = polish_records(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert (whole / "progress" / "stage1.polish-00000004.png").is_file()
    status = read_status(whole)
    assert [phase.name for phase in status.phases] == ["stage1", "cache", "stage1.polish", "stage2", "report"]
    assert status.phases[2].step == status.phases[2].steps == 4
    assert status.phases[2].losses["l1"]
    assert status.next is None
    report = json.loads((whole / "report.json").read_text())
    assert "stage1.polish" in report["phases"]
    assert {"full", "full, before the polish"} <= {row["name"] for row in report["reconstruction"]}
    assert "Polish" in (whole / "report.html").read_text()
    # verbs take the polished one; vae/ stays that of stage 1
    assert find_upgrade(str(whole)).vae == whole / "polished"
    assert torch.equal(open_autoencoder(str(whole)).last_decoder_weight.cpu(), after_last(whole / "polished"))
    assert torch.equal(open_autoencoder(str(whole / "vae")).last_decoder_weight.cpu(), after_last(whole / "vae"))
    unpolished = decoder_before_polish(whole, load_pipeline(str(whole / "pipeline")).vae)
    assert unpolished is not None
    assert torch.equal(unpolished.last_decoder_weight.cpu(), after_last(whole / "vae"))
    # stopped in its middle and resumed: the same bits
    broken = folders / "broken"

    def stop(progress: Progress) -> None:
        if (progress.task, progress.step) == ("stage1.polish", 3):
            os.kill(os.getpid(), signal.SIGINT)

    run = start(broken, run__sample_every=2, **POLISH)
    run.observer = stop
    with pytest.raises(Interrupted, match=r"stage1.polish: stopped at step 3 of 4"):
        finish(run)
    assert not (broken / "polished").exists()
    finish(start(broken, run__sample_every=2, **POLISH))
    assert same(weights(broken / "polished"), after)
    assert same(transformer(broken), transformer(whole))
    assert polish_records(broken) == records


def polish_records(run: Path) -> list[dict[str, Any]]:
    """Return what the polish has logged, without its speed."""
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["stage"] == "stage1.polish"]
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]


def after_last(folder: Path) -> torch.Tensor:
    return weights(folder)["decoder.conv_out.weight"]


def test_added_to_a_finished_run_it_alone_is_trained(
    start: Start, whole: Path, folders: Path, caplog: pytest.LogCaptureFixture
):
    plain = folders / "plain"
    finish(start(plain), report=True)
    before, cache = transformer(plain), {p: p.read_bytes() for p in (plain / "cache").rglob("*") if p.is_file()}
    for checkpoint in (plain / "checkpoints").glob("stage*-0*"):
        shutil.rmtree(checkpoint)  # they take space, and people delete them
    stage1 = {name: tensor.clone() for name, tensor in weights(plain / "vae").items()}
    assert find_upgrade(str(plain)).vae == plain / "vae"
    seen: list[str] = []
    finish(start(plain, seen, **POLISH), report=True)
    assert set(seen) == {"stage1.polish", "report"}
    assert same(transformer(plain), before)
    assert same(weights(plain / "vae"), stage1)
    assert same(weights(plain / "pipeline" / "vae"), weights(plain / "polished"))
    assert cache == {p: p.read_bytes() for p in (plain / "cache").rglob("*") if p.is_file()}
    assert find_upgrade(str(plain)).vae == plain / "polished"
    # equal to a run that had it from the start: stage 2 does not read the decoder
    assert same(weights(plain / "polished"), weights(whole / "polished"))
    assert same(before, transformer(whole))
    with pytest.raises(
        RunError, match=r"another recipe: stage1.polish: max_steps=4, .* -> None; use another --out, or"
    ):
        start(plain)
    # longer: it goes on, and is exported again
    seen.clear()
    finish(start(plain, seen, stage1__polish={"max_steps": 5}), report=True)
    assert set(seen) == {"stage1.polish", "report"}
    assert seen.count("stage1.polish") == 1
    assert same(transformer(plain), before)
    # a longer stage 1 takes its polish along from the start
    with caplog.at_level(logging.WARNING, "davae"):
        seen.clear()
        finish(start(plain, seen, stage1__max_steps=3, stage1__polish={"max_steps": 5}))
    assert seen.count("stage1.polish") == 5
    assert "stage1.polish begins again, its checkpoints are now named earlier-*" in caplog.text


def test_a_shared_stage_1_takes_its_polish_along(
    start: Start, whole: Path, folders: Path, caplog: pytest.LogCaptureFixture
):
    first, seen = whole, list[str]()
    finish(start(folders / "same", seen, first, stage2__lr=0.01, run__sample_every=2, **POLISH))
    assert set(seen) == {"stage2"}
    assert same(weights(folders / "same" / "pipeline" / "vae"), weights(first / "polished"))
    assert find_upgrade(str(folders / "same")).vae == folders / "same" / "polished"
    seen.clear()
    other = {"stage1__polish": {"max_steps": 1, "noise": 0.8}}
    finish(start(folders / "other", seen, first, stage2__detail_scale=0.5, **other))
    assert set(seen) == {"stage1.polish", "stage2"}, "another polish on the same stage 1"
    assert not same(weights(folders / "other" / "polished"), weights(first / "polished"), "decoder.")
    config = json.loads((folders / "other" / "pipeline" / "vae" / "config.json").read_text())
    kept = json.loads((folders / "other" / "polished" / "config.json").read_text())
    assert config["detail_std"] == kept["detail_std"], "with the scale of its own stage 2, for exports"
    seen.clear()
    finish(start(folders / "residual", seen, first, stage2__detail_residual=True, **POLISH))
    assert set(seen) == {"stage1.polish", "stage2"}, "a polish on latents that are normalised otherwise"
    assert load_detail_vae(folders / "residual" / "pipeline" / "vae").detail_kernel is not None
    measured = json.loads((first / "polished" / "config.json").read_text())["detail_std"]
    assert config["detail_std"] == pytest.approx([2 * value for value in measured])
    with caplog.at_level(logging.WARNING, "davae"):
        run = start(folders / "none", stage1=first)
    assert f"{first}: its polished decoder is left, as this recipe has no stage1.polish" in caplog.text
    assert run.first == first
    run.folder.close()
    # with a cache of its own, a polish of equal values is taken along too
    seen.clear()
    finish(start(folders / "variants", seen, first, cache__variants=3, **POLISH))
    assert not any(name.startswith("stage1") for name in seen)
    assert same(weights(folders / "variants" / "polished"), weights(first / "polished"))
    assert read_meta(folders / "variants" / "cache").items == 3 * read_meta(first / "cache").items // 2


def test_a_polish_of_other_settings_or_images_is_another(tiny_base: Path, picture_folder: Path):
    """With `init` runs may share stage 1 though its settings, which the polish takes, differ."""

    def recipe(**changes: object) -> Any:
        return validate(tiny_upgrade_recipe(tiny_base, picture_folder, **{**POLISH, **changes}), "tiny")

    assert polished_alike(recipe(), recipe(stage2__lr=0.5))
    for change in ({"stage1__lambda_l1": 3.0}, {"stage1__data": {"source": "other"}}, {"stage1__polish": None}):
        assert not polished_alike(recipe(), recipe(**change))


def test_noise_of_a_polish_is_in_units_of_one_std(monkeypatch: pytest.MonkeyPatch):
    """An upgrade to go on from may normalise its detail to a smaller std, by `stage2.detail_scale`."""
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    vae.set_detail_statistics(torch.zeros(8), torch.full((8,), 2.0))
    monkeypatch.setattr(upgrade_parts, "read_meta", lambda folder: None)
    monkeypatch.setattr(upgrade_parts, "check_stage_inputs", lambda *args: None)
    monkeypatch.setattr(upgrade_parts, "PolishTask", lambda settings, vae, *args: vae)
    run: Any = MagicMock(init=Path("other"), first=Path("run"))
    run.measured_vae.return_value, run.recipe.stage2.detail_scale = vae, 0.5
    run.recipe.stage1.polishing.seed = run.recipe.run.seed = 0
    assert upgrade_parts.UpgradeParts.polish_task(run).config["detail_std"] == [1.0] * 8


def test_an_upgrade_to_go_on_from_is_polished_and_gone_on_from(start: Start, tmp_path: Path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    finish(start(first))
    seen: list[str] = []
    finish(start(second, seen, init=str(first), **POLISH))
    assert "stage1" not in seen
    assert seen.count("stage1.polish") == 4
    assert same(weights(second / "vae"), weights(first / "vae"))
    assert not same(weights(second / "polished"), weights(first / "vae"), "decoder.")
    stds = [
        json.loads((run / name / "config.json").read_text())["detail_std"]
        for run, name in ((first, "vae"), (second, "polished"))
    ]
    assert stds[0] == stds[1], "the statistics that it was trained with"
    finish(start(third, init=str(second)))
    assert same(weights(third / "vae"), weights(second / "polished"))
