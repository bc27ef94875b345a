"""Rows of a table that train a base recipe: their autoencoders, shared by seeds and tables, and what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from test_lightning_dit import random_model, small_autoencoder

from davae import ClassConditionalPipeline, DetailVAE
from davae.data.latent_cache.read import CachedLatents
from davae.lab.reproduce.choose import jobs
from davae.lab.reproduce.job import BaseJob
from davae.lab.reproduce.runs import finished, run_job, trained_autoencoder
from davae.lab.reproduce.tables import Scale, Table
from davae.lab.reproduce.tabulate import table_rows
from davae.pretrained.open import load_pipeline
from davae.recipes import Recipe, load_recipe
from davae.runs.cache import PREPARED_BY

SIZES = {"family": "lightningdit", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
RUN = {"log_every": 1, "checkpoint_every": 2}


def base_jobs(table: str, scale: str = "micro", seeds: int = 1) -> dict[str, BaseJob]:
    """The jobs of a table that train a base recipe, by row."""
    return {job.row: job for job in jobs(table, scale, seeds, []) if isinstance(job, BaseJob)}  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["micro", "paper"])
def test_the_rows_of_table_2_differ_in_their_latents_alone(scale: str):
    rows = base_jobs("table2", scale)
    assert len(rows) == 4
    side = {"micro": 8, "paper": 16}[scale]
    trained = []
    for job in rows.values():
        recipe = job.recipe
        trained.append(recipe.model_copy(update={"autoencoder": "", "vae": None, "architecture": ""}))
        factor, patch = (int(number) for number in re.findall(r"f(\d+).*p = (\d+)", job.row)[0])
        assert recipe.architecture.patch_size == patch
        assert recipe.resolution == factor * patch * side, "the same number of tokens"
    assert all(recipe == trained[0] for recipe in trained)


def test_autoencoders_are_shared_by_seeds_tables_and_upgrades():
    rows, second = base_jobs("table2"), base_jobs("table2", seeds=2)
    for name, job in rows.items():
        assert second[name].seed == 1
        assert second[name].key != job.key
        assert second[name].autoencoder_key == job.autoencoder_key
    assert len({job.autoencoder_key for job in rows.values()}) == 4
    p2 = base_jobs("table1")["LightningDiT, p = 2"]
    assert p2.autoencoder_key == rows["VA-VAE-like f8, p = 2"].autoencoder_key
    detail = rows["DetailVAE f16, p = 1"]
    upgrade = next(job for job in jobs("table5", "micro", 1, []) if job.row == "full")
    assert detail.autoencoder_key == upgrade.stage1_key  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("base", "upgrade"),
    [
        ("imagenette128-scratch", "imagenette128-micro"),
        ("imagenette128-p2", "imagenette128-micro"),
        ("imagenet512-scratch", "imagenet512-lightningdit-xl"),
    ],
)
def test_the_cache_of_an_upgrade_serves_its_base_recipes(base: str, upgrade: str):
    one, other = load_recipe(base), load_recipe(upgrade)
    assert isinstance(other, Recipe)
    for name in (*PREPARED_BY, "source", "holdout", "limit"):
        assert getattr(one.data, name) == getattr(other.data, name)
    assert (one.cache.variants, one.cache.dtype) == (other.cache.variants, other.cache.dtype)
    assert (one.resolution, one.run.seed) == (other.resolution, other.run.seed)


# -- tiny runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_class_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline of 16 px: f2, 8x8 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("class") / "base"
    sizes = {key: value for key, value in SIZES.items() if key != "family"}
    model = random_model(torch.float32, **sizes, input_size=8, use_qknorm=True)
    ClassConditionalPipeline(small_autoencoder(), model, class_names=["golf ball", "tench"]).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tables(tiny_class_base: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of all kinds of autoencoders: 32 px and 8x8 tokens, the base has 16 px."""
    data = {"source": str(classes), "holdout": 0.2, "flip": True}
    loss = {"max_steps": 2, "batch_size": 2, "perceptual": "lite0", "lambda_adv": 0.0}
    base = {
        "kind": "base",
        "name": "tiny-scratch",
        "resolution": 32,
        "autoencoder": {"channels": [8, 8], "norm_groups": 4, "latent_channels": 4},
        "architecture": {**SIZES, "patch_size": 2},
        "data": data,
        "vae": loss,
        "cache": {"variants": 2, "batch_size": 4},
        "dit": {"max_steps": 2, "batch_size": 4, "cosine_loss": "all"},
        "run": RUN,
    }
    upgrade = {
        "name": "tiny-class",
        "base": {"model": str(tiny_class_base), "resolution": 16},
        "detail_channels": 8,
        "data": data,
        "stage1": loss,
        "cache": {"variants": 2, "batch_size": 4},
        "stage2": {"max_steps": 2, "batch_size": 4},
        "run": RUN,
    }
    for name, values in (("base", base), ("upgrade", upgrade)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    recipe = str(tmp_path / "base.yaml")
    generation = {"data": str(classes), "num": 4, "steps": 1, "guidance": 1.0, "features": "lite0"}
    scale = Scale.model_validate(
        {
            "recipe": str(tmp_path / "upgrade.yaml"),
            "set": {},
            "seeds": 2,
            "generation": generation,
            "reconstruction": {"data": str(classes), "num": 4},
            "super_resolution": None,
        }
    )
    deep = {"family": "dc", "channels": [8, 8, 16], "latent_channels": 8}
    own = {"autoencoder": str(tiny_class_base / "vae"), "vae": None}
    table = Table.model_validate(
        {
            "title": "Tiny",
            "claim": "none",
            "micro": [
                {"name": "kl", "recipe": recipe},
                {
                    "name": "dc",
                    "recipe": recipe,
                    "set": {"autoencoder": deep, "vae.lambda_kl": 0.0, "architecture.patch_size": 1},
                },
                {"name": "pretrained", "recipe": recipe, "set": own},
                {"name": "detail", "recipe": recipe, "detail_vae": {}, "set": {"architecture.patch_size": 1}},
                {"name": "upgrade"},
            ],
        }
    )
    monkeypatch.setattr("davae.lab.reproduce.choose.load_scale", lambda name: scale)
    monkeypatch.setattr("davae.lab.reproduce.choose.load_table", lambda name: table)
    return tmp_path


def test_generators_from_scratch_on_every_kind_of_autoencoder(tiny_tables: Path):
    out, results = tiny_tables / "out", tiny_tables / "results"
    todo = jobs("tiny", "micro", 2, [])
    told: list[str] = []
    for job in todo[:5]:
        run_job(job, out, results, lambda progress: told.append(progress.task))
    assert told.count("vae") == 4  # two autoencoders of two steps
    assert told.count("stage1") == 2  # one DetailVAE, for its generator and for the upgrade
    assert told.count("dit") == 8
    assert len(list((out / "autoencoders").iterdir())) == 3
    assert len(list((out / "stage1").iterdir())) == 1

    shapes = {}
    for job in todo[:4]:
        assert isinstance(job, BaseJob)
        figures = finished(job, results)
        assert figures is not None
        assert figures["generation"]["resolution"] == figures["reconstruction"]["resolution"] == 32
        assert figures["generation"]["pipeline"] == figures["reconstruction"]["vae"] == "of this run"
        assert figures["training"]["loss"] > 0
        assert ("detail_vae" in figures) == (job.row == "detail")
        pipeline = load_pipeline(str(out / "runs" / job.key / "pipeline"))
        shapes[job.row] = (type(pipeline.vae).__name__, pipeline.transformer.config["in_channels"])
        assert pipeline("tench", num_inference_steps=1).images[0].size == (32, 32)
    assert shapes == {
        "kl": ("AutoencoderKL", 4),
        "dc": ("AutoencoderDC", 8),
        "pretrained": ("AutoencoderKL", 4),
        "detail": ("DetailVAE", 12),
    }

    # the second seed trains its transformer alone
    before = len(told)
    for job in todo[5:7]:
        run_job(job, out, results, lambda progress: told.append(progress.task))
    assert {task for task in told[before:] if not task.startswith("sampling")} == {"dit"}
    headings, lines = table_rows(todo, results)
    assert [line[0] for line in lines] == ["kl", "dc", "pretrained", "detail", "upgrade"]
    assert [line[-1] for line in lines] == ["2", "2", "1", "1", "1"]
    assert lines[4][headings.index("loss")] == lines[0][headings.index("base loss")] == "-"


def test_latents_of_a_row_have_the_statistics_that_its_pipeline_undoes(tiny_tables: Path):
    """Normalised, the cache has mean 0 and variance 1 in every channel that was trained here."""
    for job in jobs("tiny", "micro", 1, [], ["dc", "detail"]):
        assert isinstance(job, BaseJob)
        first = trained_autoencoder(job, tiny_tables / "out", lambda progress: None)
        cache = CachedLatents(first / "cache", "class")
        latents = torch.stack([torch.from_numpy(cache[(i, 0)][0]).float() for i in range(len(cache))])
        if job.row == "detail":
            vae = DetailVAE.from_pretrained(first / "vae")
            z_d = vae.layout.split(vae.normalise(latents))[1]
        else:
            config = yaml.safe_load((first / "vae" / "config.json").read_text())
            mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
            z_d = (latents - mean) / std
        torch.testing.assert_close(z_d.mean((0, 2, 3)), torch.zeros(z_d.shape[1]), atol=2e-2, rtol=0)
        torch.testing.assert_close(z_d.std((0, 2, 3)), torch.ones(z_d.shape[1]), atol=2e-2, rtol=0)


def test_an_interrupted_row_goes_on(tiny_tables: Path):
    """Training that was finished before its figures were written is not done again."""
    out, results = tiny_tables / "out", tiny_tables / "results"
    (job,) = jobs("tiny", "micro", 1, [], ["kl"])
    first = run_job(job, out, results, lambda progress: None)
    (results / f"{job.key}.json").unlink()
    told: list[str] = []
    again = run_job(job, out, results, lambda progress: told.append(progress.task))
    assert not {"vae", "dit"} & set(told)
    assert again["generation"] == first["generation"]
    (other,) = jobs("tiny", "micro", 1, ["run.mixed_precision=bf16"], ["kl"])
    assert isinstance(job, BaseJob)
    assert isinstance(other, BaseJob)
    started = len(told)
    folders = [trained_autoencoder(each, out, lambda progress: told.append(progress.task)) for each in (job, other)]
    assert folders[0] == folders[1]  # whole, in whichever precision
    assert len(told) == started
