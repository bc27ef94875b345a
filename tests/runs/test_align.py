"""DC-Gen's alignment: an embedder and a head for another autoencoder's latents, the body of the pretrained model kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import picture, tiny_autoencoder
from test_class_conditional import base_recipe
from test_lightning_dit import random_model, small_autoencoder
from test_training import run_cli, training_records

from davae import ClassConditionalPipeline
from davae.backbones.lightning_dit import LightningDiT
from davae.data.latent_cache.meta import read_meta, seal
from davae.data.latent_cache.read import CachedLatents, PairedLatents, collate_pairs
from davae.errors import DataError, ModelError, RecipeError
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.open import load_pipeline
from davae.recipes import BaseRecipe, differences, load_recipe, validate
from davae.recipes.sections import Run
from davae.runs.dcgen import BASE_CACHE, HeadTask, check_grids
from davae.runs.train_base import base_run, train_base
from davae.tasks.class_conditional import ClassFlowTask, build_class_transformer
from davae.train.accelerator import seed_initial_weights
from davae.train.loop import Progress, Trainer
from davae.train.random import SampleRandom
from davae.train.run_folder import RunFolder, read_metrics
from davae.vae.blocks import downsample
from davae.vae.codec import Codec
from davae.vae.frames import encode_mode
from davae.zoo import resolve

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"family": "lightningdit", "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 2}
OPTIM = {"batch_size": 4, "lr": 0.01}


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained pipeline: f2, C = 4, 16 px, 8x8 tokens, in which every path matters."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "family"}
    model = random_model(torch.float32, use_qknorm=True, **sizes)
    folder = tmp_path_factory.mktemp("base")
    ClassConditionalPipeline(small_autoencoder(), model, class_names=["golf ball", "tench"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another autoencoder: f4, C = 4."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("deep")
    tiny_autoencoder(levels=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def values(base: Path, deep: Path, classes: Path) -> dict[str, Any]:
    """A recipe from 16 to 32 px at 8x8 tokens."""
    found = base_recipe(
        resolution=32,
        autoencoder=str(deep),
        init=str(base),
        architecture=SIZES,
        align={
            "base_resolution": 16,
            "embedder": {**OPTIM, "max_steps": 30},
            "head": {**OPTIM, "max_steps": 5},
        },
        data={"source": str(classes), "holdout": 0.0, "flip": True, "crop": "random"},
        cache={"variants": 3, "batch_size": 4},
        run={"log_every": 1, "checkpoint_every": 2},
    )
    del found["vae"]
    return found


def recipe_of(values: dict[str, Any], **changes: Any) -> BaseRecipe:
    recipe = validate({**values, **changes}, "tiny")
    assert isinstance(recipe, BaseRecipe)
    return recipe


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted `davae train-base`."""
    out = tmp_path_factory.mktemp("run")
    (out / "r.yaml").write_text(yaml.safe_dump(values))
    run_cli("train-base", str(out / "r.yaml"), "--out", str(out / "run"))
    return out / "run"


def checkpoint(run: Path, stage: str) -> dict[str, Any]:
    """What a stage trained, by name, at its end."""
    path = sorted((run / "checkpoints").glob(f"{stage}-[0-9]*"))[-1]
    return next(iter(torch.load(path / "state.pt", weights_only=True)["players"].values()))


# -- what is trained, and what is not --------------------------------------------------------------------------------

HEAD_NAMES = {
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "final_layer.norm_final.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
}


def test_each_step_trains_exactly_its_parameters(finished: Path, base: Path) -> None:
    model = load_pipeline(str(base)).transformer
    buffers = {name for name, _ in model.named_buffers()}
    assert set(checkpoint(finished, "align.embedder")) == {"proj.weight", "proj.bias"}
    assert set(checkpoint(finished, "align.head")) - buffers == HEAD_NAMES
    everything = {name for name, _ in model.named_parameters()}
    assert set(checkpoint(finished, "dit")) - buffers == everything - {"pos_embed"}


def aligned(values: dict[str, Any], out: Path) -> LightningDiT:
    """The transformer after steps 1 and 2 of a run that is there."""
    recipe = recipe_of(values)
    run = base_run(recipe, out, quiet)
    vae = run.autoencoder()
    seed_initial_weights(recipe.run.seed)
    transformer = build_class_transformer(recipe, 4, 8)
    run.prepare_transformer(transformer, CachedLatents(out / "cache", "class"), vae)
    run.folder.close()
    return transformer


def test_the_body_stays_to_the_bit_and_the_rest_moves(values: dict[str, Any], finished: Path, base: Path) -> None:
    pretrained = load_pipeline(str(base)).transformer.state_dict()
    seed_initial_weights(0)
    fresh = build_class_transformer(recipe_of(values), 4, 8).state_dict()
    after = aligned(values, finished).state_dict()
    for name, tensor in after.items():
        if name in HEAD_NAMES:
            assert not torch.equal(tensor, fresh[name]), name
        else:
            assert torch.equal(tensor, pretrained[name]), name
    final = load_pipeline(str(finished / "pipeline")).transformer.state_dict()
    assert not torch.equal(final["blocks.0.attn.qkv.weight"], pretrained["blocks.0.attn.qkv.weight"].half().float())


# -- step 1 ----------------------------------------------------------------------------------------------------------


def test_both_caches_hold_the_same_draws(values: dict[str, Any], finished: Path, base: Path) -> None:
    """Item for item: encoding the cache's own pictures again gives both latents, flips and crops included."""
    run = base_run(recipe_of(values), finished, quiet)
    pictures, own_vae, base_vae = run.images, run.autoencoder(), load_pipeline(str(base)).vae
    run.folder.close()
    pairs = PairedLatents(finished / "cache", finished / BASE_CACHE)
    assert len(pairs) == 36
    seen = set()
    for number in range(36):
        images = pictures.read(number % 12, number)["image"][None]
        own, small = (torch.from_numpy(part.astype(np.float32))[None] for part in pairs[(number, 0)])
        with torch.no_grad():
            torch.testing.assert_close(own, encode_mode(own_vae, images), atol=2e-2, rtol=1e-2)
            expected = encode_mode(base_vae, downsample(images, 2))
        torch.testing.assert_close(small, expected, atol=2e-2, rtol=1e-2)
        seen.add(small.numpy().tobytes())
    assert len(seen) > 24, "draws differ; on pictures this small a crop may come twice"
    batch = collate_pairs([pairs[(0, 0)], pairs[(1, 0)]])
    assert batch["latents"].shape == batch["base_latents"].shape == (2, 4, 8, 8)


def test_caches_of_other_pictures_are_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in (finished / BASE_CACHE).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    meta = read_meta(other)
    file, rows, bucket = meta.shards[0]
    seal(other, replace(meta, shards=[(file, rows - 1, bucket), *meta.shards[1:]]))
    with pytest.raises(DataError, match="holds other images than"):
        PairedLatents(finished / "cache", other)


def test_the_error_falls_in_a_run(finished: Path) -> None:
    records = [r for r in read_metrics(finished / "metrics.jsonl") if r["stage"] == "align.embedder"]
    losses = [r["loss"] for r in records]
    assert [r["step"] for r in records] == list(range(1, 31))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert all(r["unexplained"] > 0 for r in records)


# -- step 2 ----------------------------------------------------------------------------------------------------------


def held_loss(task: ClassFlowTask, count: int = 12) -> float:
    """Flow loss of a task's model on fixed latents and noise."""
    batch = task.collate([task.dataset[(number, 0)] for number in range(count)])
    with torch.no_grad():
        return float(task.loss("dit", batch, 0, SampleRandom(7, "held", 0, 0, count))[0])


def test_an_aligned_head_is_better_than_a_random_one(values: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    longer = {**values["align"], "head": {**OPTIM, "batch_size": 8, "max_steps": 60, "caption_dropout": 0.0}}
    recipe = recipe_of(values, align=longer)
    model = aligned(values, finished)
    torch.nn.init.xavier_uniform_(model.final_layer.linear.weight)
    cache, scale = (
        CachedLatents(finished / "cache", "class"),
        Codec(load_autoencoder(values["autoencoder"])).statistics,
    )
    task = HeadTask(recipe, model, cache, scale, torch.device("cpu"))
    before = held_loss(task)
    run = Run(log_every=10, checkpoint_every=100)
    Trainer(task, run, RunFolder(tmp_path / "head", recipe), Accelerator(cpu=True)).fit()
    after = held_loss(task)
    assert after < 0.9 * before
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.zeros_(model.final_layer.linear.bias)
    assert after < held_loss(task), "and than one that says nothing"


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "step"), [("cache base latents", 8), ("align.embedder", 13), ("align.head", 3), ("dit", 2)]
)
def test_an_interrupted_run_goes_on_to_the_bit(
    values: dict[str, Any], finished: Path, stage: str, step: int, tmp_path: Path
) -> None:
    recipe = recipe_of(values)

    def stop(progress: Progress) -> None:
        if progress.task == stage and progress.step >= step:
            raise KeyboardInterrupt

    run = base_run(recipe, tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.folder.close()
    assert not (tmp_path / "pipeline").exists()
    train_base(recipe, tmp_path, quiet)
    assert training_records(tmp_path) == training_records(finished)
    for name in ("align.embedder", "align.head", "dit"):
        mine, theirs = checkpoint(tmp_path, name), checkpoint(finished, name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name


def test_a_finished_alignment_takes_no_other_length(values: dict[str, Any]) -> None:
    old = recipe_of(values)
    longer = {**values["align"], "embedder": {**OPTIM, "max_steps": 31}}
    assert differences(old, recipe_of(values, align=longer)) == ["align.embedder.max_steps: 30 -> 31"]
    assert not differences(old, recipe_of(values, dit={**values["dit"], "max_steps": 4}))


def test_the_shipped_recipe_runs_when_it_is_made_small(tmp_path: Path) -> None:
    for number in range(4):
        target = tmp_path / "pictures" / ("a", "b")[number % 2] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 136, 128).save(target)
    small = [
        "init=" + str(ROOT / "benchmarks/weights/imagenette64"),
        *("vae.max_steps=1", "vae.batch_size=1", "align.embedder.max_steps=2", "align.embedder.batch_size=2"),
        *("align.head.max_steps=1", "align.head.batch_size=2", "dit.max_steps=1", "dit.batch_size=2"),
        *("data.holdout=0.0", "run.log_every=1"),
    ]
    options = [word for change in small for word in ("--set", change)]
    out = tmp_path / "run"
    run_cli("train-base", "imagenette128-dcgen", "--data", str(tmp_path / "pictures"), "--out", str(out), *options)
    pipeline = load_pipeline(str(out / "pipeline"))
    assert pipeline.transformer.config["in_channels"] == 32
    assert pipeline.transformer.config["input_size"] == 8
    assert pipeline(1, num_inference_steps=1).images[0].size == (128, 128)
    assert [r["stage"] for r in read_metrics(out / "metrics.jsonl")] == [
        "vae", "align.embedder", "align.embedder", "align.head", "dit",
    ]  # fmt: skip


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None}, "align needs init, the pretrained model"),
        ({"cache": {"shards": "x"}}, "leave out cache.shards"),
        ({"resolution": 40}, "align.base_resolution is 16, resolution 40 is not a multiple of it"),
    ],
)
def test_a_recipe_that_cannot_align_is_one_line(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_of(values, **changes)
    assert "\n" not in str(caught.value)


def test_text_models_are_refused(values: dict[str, Any]) -> None:
    text: Any = load_recipe("micro-base")
    with pytest.raises(RecipeError, match="init and align need a class-conditional model"):
        recipe_of(values, architecture=text.architecture.model_dump())


@pytest.mark.parametrize(("resolution", "base_resolution", "use"), [(32, 8, 16), (64, 16, 32)])
def test_other_grids_are_told_before_anything_is_trained(
    values: dict[str, Any], resolution: int, base_resolution: int, use: int, tmp_path: Path
) -> None:
    wrong = recipe_of(values, resolution=resolution, align={**values["align"], "base_resolution": base_resolution})
    with pytest.raises(RecipeError, match=rf"align.base_resolution: the new model has .* use {use}$") as caught:
        train_base(wrong, tmp_path / "run", quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    odd = recipe_of(values, architecture={**SIZES, "patch_size": 3})
    with pytest.raises(RecipeError, match="resolution: 32 is not divisible by 12"):
        check_grids(odd)


def test_grids_of_every_kind_of_autoencoder(values: dict[str, Any], tmp_path: Path) -> None:
    section = {"channels": [8, 8, 8], "norm_groups": 4, "latent_channels": 6}
    check_grids(recipe_of(values, autoencoder=section, vae={"max_steps": 1, "batch_size": 1}))
    base = {"block_out_channels": [8, 8], "latent_channels": 2}
    detail = {"base_class": "AutoencoderKL", "base_config": base, "scale": 2, "latent_channels": 6}
    deep = {"encoder_block_out_channels": [8, 8, 8], "latent_channels": 6}
    for kind, config in (("DetailVAE", detail), ("AutoencoderDC", deep)):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
        check_grids(recipe_of(values, autoencoder=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOfTomorrow"}))
    with pytest.raises(ModelError, match="autoencoder class AutoencoderOfTomorrow is not supported"):
        check_grids(recipe_of(values, autoencoder=str(tmp_path)))


def test_the_base_s_own_autoencoder_is_refused(
    values: dict[str, Any], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = {**values, "autoencoder": str(base), "resolution": 16}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("train-base", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "there is nothing to align; leave out align, or give another autoencoder" in error
    assert not (tmp_path / "run" / "cache").exists()


def test_a_wrong_body_is_still_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has depth 2, the recipe has 3"):
        train_base(recipe_of(values, architecture={**SIZES, "depth": 3}), tmp_path, quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {**SIZES, "depth": 3}}, "has depth 2, the recipe has 3"),
        ({"init": "clothing"}, "init clothing has hidden_size 192, the recipe has"),
        ({"init": "micro"}, "init micro is a SD3Transformer2DModel; set init to a LightningDiT"),
        ({"init": "nowhere"}, "model 'nowhere' is not a folder here, a preset or a hub id"),
        ({"autoencoder": "nowhere"}, "nowhere"),
    ],
)
def test_what_init_cannot_be_shows_before_an_image_is_read(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plain = {**values, "align": None, "data": {"source": str(tmp_path / "no images")}}
    with pytest.raises(ModelError, match=message):
        train_base(recipe_of(plain, **changes), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_an_embedded_model_is_a_start_by_its_name() -> None:
    recipe = load_recipe("clothing-base", ["init=clothing", "autoencoder=clothing"])
    assert isinstance(recipe, BaseRecipe)
    start = build_class_transformer(recipe, 32, 8)
    shipped = load_pipeline(resolve("clothing")).transformer
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), shipped.parameters(), strict=True))


def test_a_text_to_image_base_refuses_init() -> None:
    with pytest.raises(RecipeError, match="init and align need a class-conditional model"):
        load_recipe("micro-base", ["init=clothing"])


def test_old_recipes_hash_as_before() -> None:
    """Results are filed under a hash of what is not a default; `align` must not show where it is not used."""
    for name in ("micro-base", "imagenette128-micro", "imagenet512-lightningdit-xl-p2"):
        recipe = load_recipe(name)
        assert '"align"' in json.dumps(recipe.model_dump(mode="json"))
        assert '"align"' not in json.dumps(recipe.model_dump(mode="json", exclude_defaults=True))
