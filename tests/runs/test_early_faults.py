"""Faults that configs, headers and names show: found before anything is trained, and the folder takes a corrected recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cases import BUILDERS
from conftest import picture, tiny_upgrade_recipe
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from davae.commands.upgrade import _show_report
from davae.errors import DataError, DavaeError, ModelError, RecipeError
from davae.evaluate import generation
from davae.lab.super_resolution import train_super_resolution
from davae.losses.perceptual import random_lpips
from davae.publish.report_file import read_report
from davae.recipes import BaseRecipe, Recipe, load_recipe
from davae.recipes.loading import validate
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.runs.checks import check_recipe
from davae.runs.report import run_with_report
from davae.runs.train_base import train_base
from davae.runs.upgrade import Upgrade
from davae.sample import image_folder
from davae.sample.image_folder import draw_samples
from davae.sample.open import SamplingOptions
from davae.sample.resume import kept_images
from davae.tasks.base_model import BaseModel
from davae.train.loop import Progress


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without classes."""
    folder = tmp_path_factory.mktemp("flat")
    for number in range(6):
        picture(number).resize((128, 128)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 18 classes; the embedded model has 17."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(18):
        (folder / f"class{number:02d}").mkdir()
        picture(number).resize((128, 128)).save(folder / f"class{number:02d}" / "0.png")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes."""
    folder = tmp_path_factory.mktemp("few")
    for number in range(6):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        picture(number).resize((128, 128)).save(folder / "ab"[number % 2] / f"{number}.png")
    return folder


def upgrade(name: str, source: Path, out: Path, *overrides: str) -> Upgrade:
    """Return the run of a shipped recipe, with its data checked."""
    recipe = load_recipe(name, [f"data.source={source}", "data.holdout=0", "stage1.perceptual=lite0", *overrides])
    assert isinstance(recipe, Recipe)
    run = Upgrade(recipe.model_copy(update={"stage1": plain(recipe)}), out, quiet)
    run.check_data()
    return run


def plain(recipe: Recipe) -> Any:
    """Stage 1 without a file of perceptual weights, unless the test names one."""
    shipped = "../shared" in (recipe.stage1.perceptual_weights or "")
    return recipe.stage1.model_copy(update={"perceptual_weights": None}) if shipped else recipe.stage1


def begun(out: Path) -> bool:
    return any((out / name).exists() for name in ("metrics.jsonl", "vae", "cache")) or any(out.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ("flat", [], "a class-conditional model needs a class for every image"),
        ("many", [], "has class label 17, the model has classes 0 to 16"),
        ("few", ["cache.shards=/nowhere"], "/nowhere has no latent shards"),
        ("few", ["stage2.data={source: /nowhere}"], "/nowhere"),
    ],
)
def test_what_stage_2_cannot_learn_from_is_found_before_stage_1(
    request: pytest.FixtureRequest, few: Path, tmp_path: Path, data: str, overrides: list[str], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match=message):
        upgrade("clothing", request.getfixturevalue(data), out, *overrides)
    assert not begun(out)
    corrected = upgrade("clothing", few, out)
    corrected.folder.close()


def test_latent_shards_of_another_number_of_channels_and_of_a_text_model(few: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    tensors = {"latents": torch.zeros(2, 5, 8, 8), "labels": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, shards / "latents_rank00_shard000.safetensors")
    for name, message in (
        ("clothing", "latents of 5 channels, the model takes 128"),
        ("micro", "they train class-conditional models"),
    ):
        with pytest.raises(DataError, match=message):
            upgrade(name, few, tmp_path / name, f"cache.shards={shards}")
        assert not begun(tmp_path / name)
    with pytest.raises(DataError, match="latents of 5 channels, the model takes 32"):
        base("clothing-base", few, tmp_path / "base", f"cache.shards={shards}")


def base(name: str, source: Path, out: Path, *overrides: str) -> Path:
    recipe = load_recipe(name, [f"data.source={source}", "data.holdout=0", *overrides])
    assert isinstance(recipe, BaseRecipe)
    return train_base(recipe, out, quiet)


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ("flat", [], "a class-conditional model needs a class for every image"),
        ("many", [], "has class label 17, the model has classes 0 to 16"),
        ("few", ["architecture.num_heads=7"], "hidden_size 192 over 7 heads"),
        ("few", ["autoencoder=nothing"], "nothing"),
        ("few", ["run.trackers=[trackio]"], "run.trackers: trackio is not installed"),
    ],
)
def test_what_a_base_cannot_learn_from_is_found_before_its_cache(
    request: pytest.FixtureRequest, tmp_path: Path, data: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(DavaeError, match=message):
        base("clothing-base", request.getfixturevalue(data), tmp_path, *overrides)
    assert not begun(tmp_path)


def test_a_file_of_perceptual_weights_is_read_before_anything_else(few: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    network = load_recipe("clothing-sr", [f"data.source={few}", "network.perceptual_weights=/nowhere"])
    assert isinstance(network, SuperResolutionRecipe)
    with pytest.raises(ModelError, match="perceptual weights /nowhere do not exist"):
        train_super_resolution(network, tmp_path / "sr", quiet)
    for weights, message in (("/nowhere", "do not exist"), (str(other), "lack 'features.0.weight' of LPIPS alex")):
        with pytest.raises(ModelError, match=message):
            upgrade(
                "clothing",
                few,
                tmp_path / "up",
                "stage1.perceptual=lpips-alex",
                f"stage1.perceptual_weights={weights}",
            )
    assert not (tmp_path / "sr").exists()
    assert not (tmp_path / "up").exists()
    save_file(random_lpips("alex"), tmp_path / "alex.safetensors")
    given = ["stage1.perceptual=lpips-alex", f"stage1.perceptual_weights={tmp_path / 'alex.safetensors'}"]
    upgrade("clothing", few, tmp_path / "done", *given, "stage1.polish=null").folder.close()
    (tmp_path / "alex.safetensors").unlink()
    (tmp_path / "done" / "checkpoints" / "stage1.done").write_text("400")
    upgrade("clothing", few, tmp_path / "done", *given, "stage1.polish=null").folder.close()  # it needs them no more


@pytest.mark.parametrize("prompt", ["a red rose", "17", "shi"])
def test_prompts_of_the_report_are_classes(few: Path, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(
        RecipeError, match=r"sampling.prompts: .*(a class of this model|out of range|fits \d classes)"
    ):
        upgrade("clothing", few, tmp_path / "run", f"sampling.prompts=['{prompt}']")
    upgrade("clothing", few, tmp_path / "run", "sampling.prompts=[Dress, '16', shoe]").folder.close()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"rank": 2, "extra_targets": ["no.such"]},
            r"stage2\.lora\.extra_targets: no layer of SD3Transformer2DModel",
        ),
        ({"rank": 2, "extra_targets": ["norm1.linear"], "train_norms": True}, "which train_norms trains in full"),
    ],
)
def test_layers_that_a_lora_cannot_adapt_are_found_before_stage_1(
    tiny_base: Path, picture_folder: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    recipe = validate(
        {"kind": "upgrade", **tiny_upgrade_recipe(tiny_base, picture_folder, stage2__lora=lora)}, "tiny"
    )
    assert isinstance(recipe, Recipe)
    with pytest.raises(RecipeError, match=message):
        Upgrade(recipe, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_half_precision_weights_in_pieces_are_refused_before_stage_1(
    tiny_base: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    half = {"base__dtype": "bfloat16", "run__mixed_precision": "bf16"}
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(tiny_base, picture_folder, **half)}, "tiny")
    assert isinstance(recipe, Recipe)
    run = Upgrade(recipe, tmp_path / "run", quiet)
    with pytest.raises(RecipeError, match="bfloat16 weights cannot be cut into pieces"):
        run.train_dit()
    assert not begun(tmp_path / "run")
    run.folder.close()


def test_a_lora_that_is_not_there_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "open_model", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(ModelError, match=r"LoRA file .*none.safetensors does not exist"):
        draw_samples(
            "micro", ["a red rose"], SamplingOptions(), folder=tmp_path, num=1, lora=tmp_path / "none.safetensors"
        )


def test_settings_without_an_image_give_way_to_others(tmp_path: Path) -> None:
    def hold(folder: Path, **settings: Any) -> None:
        with kept_images(folder, settings, {}):
            pass

    hold(tmp_path / "own", steps=2, seed=0)
    hold(tmp_path / "own", steps=3, seed=0)
    (tmp_path / "own" / "0.png").write_bytes(b"")
    with pytest.raises(ModelError, match="images of other settings"):
        hold(tmp_path / "own", steps=4, seed=0)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "settings.json").write_text('{"theme": "dark"}')
    with pytest.raises(ModelError, match="images of other settings"):
        hold(foreign, steps=4)
    assert foreign.joinpath("settings.json").read_text() == '{"theme": "dark"}'


def test_a_run_that_began_keeps_its_recipe(few: Path, tmp_path: Path) -> None:
    upgrade("clothing", few, tmp_path).folder.close()
    upgrade("clothing", few, tmp_path, "detail_channels=64").folder.close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DavaeError, match="holds a run of another recipe: detail_channels: 64 -> 96"):
        upgrade("clothing", few, tmp_path)


def test_what_a_measurement_lacks_is_found_before_the_model_is_loaded_or_an_image_measured(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure_images", "real_images", "drawn_batches"):
        monkeypatch.setattr(generation, name, lambda *given, **more: pytest.fail("something was measured"))
    options: dict[str, Any] = {
        "num": 8,
        "held_in": 0.0,
        "features": "lite0",
        "feature_weights": None,
        "compare_at": 64,
    }

    def measure(source: Path, at: int | None = None, **changes: Any) -> None:
        generation.evaluate_generation(
            "clothing",
            str(source),
            SamplingOptions(resolution=at),
            on_batch=lambda done, total: None,
            **options | changes,
        )

    with pytest.raises(ModelError, match="100 pixels are not divisible by 8"):
        measure(few, at=100)
    with pytest.raises(DavaeError, match="/nowhere"):
        measure(few, compare_at=128, upscale="/nowhere.safetensors")
    (tmp_path / "a").mkdir()
    for number in range(2):
        picture(number).resize((128, 128)).save(tmp_path / "a" / f"{number}.png")
    with pytest.raises(DataError, match="at least 4 images a side are needed, found 8 and 2"):
        measure(tmp_path)
    with pytest.raises(DavaeError, match="/nowhere"):
        generation.evaluate_pictures(
            str(few), "/nowhere", num=None, resolution=64, features="lite0", feature_weights=None
        )
    monkeypatch.setattr(generation, "open_model", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(DavaeError, match="/nowhere"):
        measure(few, features="inception", feature_weights=Path("/nowhere.pth"))


def test_a_recipe_that_davae_did_not_put_there_is_kept(few: Path, tmp_path: Path) -> None:
    upgrade("clothing", few, tmp_path / "other", "detail_channels=64").folder.close()
    own = (tmp_path / "other" / "recipe.yaml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text(own)
    with pytest.raises(DavaeError, match=r"mine: it holds|holds a run of another recipe"):
        upgrade("clothing", few, tmp_path / "mine")
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == own


@pytest.mark.parametrize(("name", "side"), [("micro", 32), ("auraflow", 128)])
def test_an_image_without_positions_is_known_from_configs(name: str, side: int) -> None:
    """AuraFlow's table counts all positions: 9,216 are 96 in a row."""
    size = ["scale=4"] if name == "micro" else ["base.resolution=1024", "base.model=auraflow", "detail_channels=4"]
    recipe = load_recipe("micro", size)
    assert isinstance(recipe, Recipe)
    base, known = BaseModel.of(recipe, configs=name if name != "micro" else None), 16 if name == "micro" else 96
    line = f"{recipe.resolution} pixels are {side} tokens in a row, and {name} knows positions up to {known}"
    assert base.cannot_draw(recipe.resolution) == line
    assert base.cannot_draw(recipe.base.resolution) == ""


def test_a_base_without_positions_for_the_upgrades_size_gets_a_report_without_it(
    tiny_base: Path, picture_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    stock = SD3Transformer2DModel.from_pretrained(tiny_base / "transformer")
    own = SD3Transformer2DModel.from_config({**stock.config, "pos_embed_max_size": 6})
    weights = stock.state_dict()
    weights["pos_embed.pos_embed"] = own.state_dict()["pos_embed.pos_embed"]
    own.load_state_dict(weights)
    own.save_pretrained(tmp_path / "base" / "transformer")
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(tmp_path / "base", picture_folder)}, "tiny")
    assert isinstance(recipe, Recipe)
    page = run_with_report(Upgrade(recipe, tmp_path / "run", quiet), quiet).read_text()
    assert "32 pixels are 8 tokens in a row" in page
    assert "knows positions up to 6. So nothing here is compared with it" in page
    assert "base, native" not in page
    rows = read_report(tmp_path / "run")["speed"]
    assert [(row["name"], row["speedup_over_native"]) for row in rows] == [
        ("base at 16, enlarged", None),
        ("upgraded", None),
    ]
    _show_report(tmp_path / "run")  # the table that the command prints


def test_a_base_of_one_area_is_upgraded_from_it(tmp_path: Path) -> None:
    """The pipeline of HiDream-I1 rescales every size to 128 x 128 latent positions, here of one pixel."""
    BUILDERS["HiDreamImageTransformer2DModel"](tmp_path)
    for side in (128, 192):
        recipe = load_recipe("micro", [f"base.resolution={side}", f"base.model={tmp_path}", "detail_channels=4"])
        assert isinstance(recipe, Recipe)
        base = BaseModel.of(recipe)
        if side == 192:
            with pytest.raises(
                RecipeError, match=r"base.resolution: .* draws 128 pixels and no other size; use 128$"
            ):
                check_recipe(recipe, base)
            continue
        check_recipe(recipe, base)
        assert base.cannot_draw(256).endswith("draws 128 pixels and no other size")
        assert base.cannot_draw(128) == ""
