"""Class-conditional runs from pictures to a report, the p=2 baseline, training on latent shards, and sample files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC
from test_convert import write_shards
from test_lightning_dit import random_model, small_autoencoder
from test_training import run_cli

from davae import ClassConditionalPipeline, DetailVAE
from davae.data.latent_cache.read import CachedLatents
from davae.errors import ModelError
from davae.evaluate.reconstruction import evaluate_reconstruction
from davae.evaluate.sample_file import class_schedule, field_uint8, write_samples
from davae.latent import LatentStatistics
from davae.pretrained.open import load_pipeline
from davae.recipes import load_recipe
from davae.tasks.class_conditional import ClassFlowTask
from davae.train.run_folder import read_metrics

SIZES = {"family": "lightningdit", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
FLOW = {"max_steps": 3, "batch_size": 4, "cosine_loss": "all"}
RUN = {"log_every": 1, "checkpoint_every": 1}


def base_recipe(**changes: object) -> dict:
    return {
        "kind": "base",
        "name": "tiny-class",
        "resolution": 16,
        "autoencoder": {"channels": [8, 8], "norm_groups": 4, "latent_channels": 4},
        "architecture": SIZES,
        "vae": {"max_steps": 2, "batch_size": 2, "perceptual": "lite0", "lambda_adv": 0.0},
        "dit": FLOW,
        "run": RUN,
        **changes,
    }


@pytest.fixture(scope="module")
def finished(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`davae upgrade` of a recipe that trains its own base first."""
    values = {
        "name": "tiny-class",
        "base": {"resolution": 16, "train": base_recipe()},
        "detail_channels": 8,
        "data": {"source": str(classes), "holdout": 0.3},
        "stage1": {"max_steps": 2, "batch_size": 2, "perceptual": "lite0", "lambda_adv": 0.0},
        "stage2": {**FLOW, "warmup_steps": 2, "cosine_loss": "faded"},
        "sampling": {"steps": 2},
        "report": {"holdout_pictures": 2, "timing_repeats": 1},
        "run": RUN,
    }
    out = tmp_path_factory.mktemp("run")
    (out / "recipe.in.yaml").write_text(yaml.safe_dump(values))
    run_cli("upgrade", str(out / "recipe.in.yaml"), "--out", str(out / "run"))
    return out / "run"


def test_a_recipe_trains_its_base_and_upgrades_it(finished: Path) -> None:
    base = load_pipeline(str(finished / "base" / "pipeline"))
    upgraded = load_pipeline(str(finished / "pipeline"))
    assert type(base) is type(upgraded) is ClassConditionalPipeline
    assert base.class_names == upgraded.class_names == ["golf ball", "tench"]
    assert upgraded("tench", num_inference_steps=2).images[0].size == (32, 32)
    assert base("tench", num_inference_steps=2).images[0].size == (16, 16)
    figures = json.loads((finished / "report.json").read_text())
    assert figures["prompts"] == ["golf ball", "tench"]
    assert [row["tokens"] for row in figures["speed"]] == [64, 256, 64]
    records = read_metrics(finished / "metrics.jsonl")
    assert all("loss_direction" in record for record in records if record["stage"] == "stage2")
    own = read_metrics(finished / "base" / "metrics.jsonl")
    assert {record["stage"] for record in own} == {"vae", "dit"}
    # normalised per channel: mean 0, variance 1 over the training set
    cache = CachedLatents(finished / "base" / "cache")
    latents = torch.tensor(np.stack([cache[(i, 0)][0] for i in range(len(cache))]).astype(np.float32))
    mean, std = (torch.tensor(base.vae.config[f"latents_{part}"]) for part in ("mean", "std"))
    torch.testing.assert_close(latents.mean((0, 2, 3)), mean, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(latents.std((0, 2, 3), unbiased=False), std, atol=1e-3, rtol=1e-2)


def test_evaluation_by_class(finished: Path, classes: Path, tmp_path: Path) -> None:
    run_cli("evaluate", "generation", "--pipeline", str(finished), "--data", str(classes), "--num", "4", "--steps", "2",
            "--json", str(tmp_path / "f.json"))  # fmt: skip
    assert json.loads((tmp_path / "f.json").read_text())["generated"] == 4


def test_the_position_table_is_not_trained(finished: Path) -> None:
    recipe = load_recipe(str(finished / "base" / "recipe.yaml"))
    cache = CachedLatents(finished / "base" / "cache", "class")
    model = random_model(torch.float32, num_classes=2)
    task = ClassFlowTask(recipe, model, cache, LatentStatistics(torch.zeros(1), torch.ones(1)), torch.device("cpu"))  # type: ignore[arg-type]
    trained = {id(parameter) for parameter in task.trainables["dit"].parameters.values()}
    assert {name for name, p in model.named_parameters() if id(p) not in trained} == {"pos_embed"}


def test_p2_baseline_starts_from_the_pretrained_model(finished: Path, classes: Path, tmp_path: Path) -> None:
    """Double the resolution at the same tokens by larger patches, autoencoder and blocks pretrained."""
    pretrained = str(finished / "base" / "pipeline")
    values = base_recipe(
        resolution=32, autoencoder=pretrained, init=pretrained, architecture={**SIZES, "patch_size": 2}
    )
    del values["vae"]
    values["data"] = {"source": str(classes)}
    (tmp_path / "p2.yaml").write_text(yaml.safe_dump(values))
    run_cli("train-base", str(tmp_path / "p2.yaml"), "--out", str(tmp_path / "p2"))
    pipeline = load_pipeline(str(tmp_path / "p2" / "pipeline"))
    assert pipeline.transformer.config["patch_size"] == 2
    assert pipeline("tench", num_inference_steps=2).images[0].size == (32, 32)

    values["architecture"]["depth"] = 2
    (tmp_path / "p2.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("train-base", str(tmp_path / "p2.yaml"), "--out", str(tmp_path / "other"))


def test_a_generator_from_scratch_on_the_detail_vae_of_a_run(finished: Path, classes: Path, tmp_path: Path) -> None:
    values = base_recipe(resolution=32, autoencoder=str(finished), data={"source": str(classes)})
    del values["vae"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    run_cli("train-base", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    pipeline = load_pipeline(str(tmp_path / "run" / "pipeline"))
    assert (type(pipeline.vae), pipeline.transformer.config["in_channels"]) == (DetailVAE, 12)
    assert pipeline.vae_scale_factor == pipeline.vae.spatial_factor == 4
    assert pipeline("tench", num_inference_steps=2).images[0].size == (32, 32)


def test_a_deep_compression_base_is_trained_and_upgraded(classes: Path, tmp_path: Path) -> None:
    loss = {"max_steps": 2, "batch_size": 2, "perceptual": "lite0", "lambda_adv": 0.0}
    base = base_recipe(
        autoencoder={"family": "dc", "channels": [8, 8, 16], "latent_channels": 8}, vae={**loss, "lambda_kl": 0.0}
    )
    values = {
        "name": "tiny-deep",
        "base": {"resolution": 16, "train": base},
        "detail_channels": 8,
        "data": {"source": str(classes)},
        "stage1": loss,
        "stage2": FLOW,
        "run": RUN,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    run_cli("train-dit", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    base_vae = load_pipeline(str(tmp_path / "run" / "base" / "pipeline")).vae
    assert type(base_vae) is AutoencoderDC
    upgraded = load_pipeline(str(tmp_path / "run" / "pipeline"))
    assert upgraded.vae.config["base_mean"] == base_vae.config["latents_mean"]
    assert upgraded("tench", num_inference_steps=2).images[0].size == (32, 32)
    assert all(
        "kl" not in r for r in read_metrics(tmp_path / "run" / "base" / "metrics.jsonl") if r["stage"] == "vae"
    )
    with pytest.raises(ModelError, match="has no size of its own; give --resolution"):
        evaluate_reconstruction(str(tmp_path / "run" / "base" / "pipeline"), str(classes), None, 2, 0.0)


def test_training_on_latent_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_shards(tmp_path / "shards", labels=2)
    small_autoencoder().save_pretrained(tmp_path / "vae")
    values = base_recipe(autoencoder=str(tmp_path / "vae"), cache={"shards": str(tmp_path / "shards")})
    del values["vae"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    run_cli("train-base", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    assert load_pipeline(str(tmp_path / "run" / "pipeline")).transformer.config["in_channels"] == 4
    write_shards(tmp_path / "shards", labels=5)
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("train-base", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "again"))
    assert "has class label 2, the model has 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.train.architecture.num_classes=1", "has class label 1, the model has classes 0 to 0"),
        ("base.train.resolution=24", "resolution is 16, base.train.resolution 24"),
        ("base.model=micro", "give either model"),
        ("base.train.architecture.patch_size=3", "not divisible by 6"),
        ("base.train.architecture.depht=3", "base.train.architecture.depht: unknown key; did you mean 'depth'?"),
        ("base.train.vae=null", "the section vae"),
        ("stage2.cosine_loss=some", "stage2.cosine_loss"),
    ],
)
def test_bad_recipes(
    finished: Path, override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("upgrade", str(finished / "recipe.yaml"), "--out", str(tmp_path / "r"), "--set", override)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


# -- sample files ----------------------------------------------------------------------------------------------


def test_sample_file_of_the_field(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "samples.npz"
    run_cli("evaluate", "samples", "--pipeline", str(finished), "--out", str(target), "--num", "6", "--steps", "2",
            "--batch-size", "4")  # fmt: skip
    with np.load(target) as file:
        assert file["arr_0"].shape == (6, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1] * 3
        first = file["arr_0"]
    run_cli("evaluate", "samples", "--pipeline", str(finished), "--out", f"{tmp_path}/b.npz", "--num", "6", "--steps", "2",
            "--batch-size", "3")  # fmt: skip
    with np.load(tmp_path / "b.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - first).max() <= 1, "pictures do not depend on the batch"


def test_rounding_and_labels() -> None:
    x = torch.linspace(-1.2, 1.2, 999).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    published = torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8)  # as ADM, DiT and LightningDiT save pictures
    found = field_uint8((x / 2 + 0.5).clamp(0, 1))[0].transpose(2, 0, 1)
    assert np.abs(found.astype(int) - published[0].numpy()).max() <= 1
    assert (found == published[0].numpy()).mean() > 0.99
    assert np.bincount(class_schedule(1000, 10, "balanced", 0)).tolist() == [100] * 10
    assert np.array_equal(class_schedule(50, 10, "random", 3), class_schedule(50, 10, "random", 3))
    assert not np.array_equal(class_schedule(50, 10, "random", 3), class_schedule(50, 10, "random", 4))
    with pytest.raises(ModelError, match="25 images do not divide into 10 classes"):
        class_schedule(25, 10, "balanced", 0)


def test_sample_files_resume_and_share_the_work(tmp_path: Path) -> None:
    """Two processes and an interruption give what one process gives, without drawing a part twice."""
    labels = class_schedule(1100, 10, "random", 0)  # five parts
    drawn: list[int] = []

    def draw(classes: list[int], first: int) -> torch.Tensor:
        drawn.append(first)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return torch.tensor(classes).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 10

    target, settings = tmp_path / "a.npz", {"seed": 0}
    with pytest.raises(KeyboardInterrupt):
        write_samples(target, labels, draw, settings=settings, rank=0, ranks=2)
    assert not write_samples(target, labels, draw, settings=settings, rank=0, ranks=2)
    assert not target.exists()
    assert write_samples(target, labels, draw, settings=settings, rank=1, ranks=2)
    assert drawn == [0, 500, 500, 1000, 250, 750]
    with np.load(target) as file:
        assert np.array_equal(file["arr_0"][:, 1, 1, 2], (labels * 25.5 + 0.5).astype(np.uint8))
        assert np.array_equal(file["arr_1"], labels)
    with pytest.raises(ModelError, match="holds images of other settings"):
        write_samples(target, labels, draw, settings={"seed": 1})


def test_the_photo_recipe_upgrades_its_trained_base_to_a_report(shared: Path, tmp_path: Path) -> None:
    """`davae upgrade imagenette128-micro` on the weights in the repository, shortened."""
    weights = Path(__file__).resolve().parents[2] / "benchmarks" / "weights" / "imagenette64"
    settings = {
        "base.model": weights,
        "base.train": "null",
        "data.source": shared / "data" / "imagenette128-train.tar",
        "data.limit": 24,
        "data.holdout": 0.2,
        "stage1.max_steps": 1,
        "stage1.batch_size": 2,
        "stage1.start": "unfolded",
        "stage1.crop": 64,
        "stage2.max_steps": 1,
        "stage2.batch_size": 2,
        "stage2.warmup_steps": 1,
        "cache.variants": 1,
        "sampling.steps": 1,
        "report.holdout_pictures": 2,
        "report.timing_repeats": 1,
    }
    out = tmp_path / "run"
    run_cli("upgrade", "imagenette128-micro", "--out", str(out), *[f"--set={k}={v}" for k, v in settings.items()])
    report = json.loads((out / "report.json").read_text())
    assert [row["tokens"] for row in report["speed"]] == [64, 256, 64]
    assert {row["name"] for row in report["reconstruction"]} >= {"base + bicubic", "zero detail", "full"}
    stages = {record["stage"]: record["step"] for record in read_metrics(out / "metrics.jsonl")}
    assert stages == {"stage1": 1, "stage2": 1}
