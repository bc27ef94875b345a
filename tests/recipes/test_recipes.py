"""Recipes: every shipped one is valid; every mistake is one line with its dotted path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from davae.errors import RecipeError
from davae.recipes import Recipe, differences, dump_recipe, load_recipe, set_values, shipped_recipes, validate
from davae.recipes.loading import describe


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_survives_dumping(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert validate(yaml.safe_load(dump_recipe(recipe)), name) == recipe
    assert shipped_recipes()[name].startswith("# ")  # `davae recipes` shows the first comment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.max_step=5", "stage1.max_step: unknown key; did you mean 'max_steps'?"),
        ("stag1.max_steps=5", "stag1: unknown key; did you mean 'stage1'?"),
        ("stage1.lr=fast", "stage1.lr: .*valid number.*'fast'"),
        ("stage2.max_steps=0", "stage2.max_steps: .*greater than 0"),
        ("stage2.warmup_steps=999999", "stage2: warmup_steps \\(N_warm\\) is 999999, more than max_steps"),
        ("run.mixed_precision=float8", "run.mixed_precision: .*'no', 'fp16' or 'bf16'"),
        ("detail_channels=-16", "detail_channels: .*greater than 0"),
        ("kind=upgrad", "kind 'upgrad' is unknown"),
        ("stage1", "--set takes a.b=value, found 'stage1'"),
        ("name.x=1", "'name' is a value, not a section"),
    ],
)
def test_mistakes_are_named(override: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("micro", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["autoencoder.latent_chanels=3"],
            "autoencoder.latent_chanels: unknown key; did you mean 'latent_channels'?",
        ),
        (["autoencoder.family=vq"], "autoencoder.family: .*'kl' or 'dc'.*'vq'"),
        (["autoencoder=null"], "autoencoder: .*valid dictionary"),
        (["autoencoder.family=dc"], "vae.lambda_kl is 1e-06, and a dc autoencoder is deterministic.*set it to 0"),
        (["autoencoder.family=dc", "autoencoder.channels=[8, 64]"], "autoencoder: channels: 8 then 64"),
        (
            ["autoencoder.family=dc", "autoencoder.latent_channels=24"],
            "latent_channels is 24.*the last of channels, 64",
        ),
        (["autoencoder=models/vae"], "pretrained one \\(models/vae\\); leave out the section vae"),
        (["vae=null"], "the section vae, which trains the autoencoder, is missing"),
    ],
)
def test_mistakes_about_an_autoencoder_are_named(overrides: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe("imagenette128-scratch", overrides)


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown recipe 'mikro'; did you mean 'micro'\?"):
        load_recipe("mikro")
    with pytest.raises(
        RecipeError, match=r"unknown recipe 'sd35'; did you mean 'sd35-.*\? `davae recipes` lists them"
    ):
        load_recipe("sd35")
    with pytest.raises(RecipeError, match=r"unknown recipe 'qzx'; `davae recipes` lists them"):
        load_recipe("qzx")


def test_several_mistakes_are_named_by_their_paths():
    with pytest.raises(
        RecipeError, match=r"stage1\.lr: .* \(found 'fast'\) \(also wrong: stage2\.lr, stage2\.max_step\)"
    ):
        load_recipe("micro", ["stage1.lr=fast", "stage2.lr=slow", "stage2.max_step=5"])


def test_errors_of_a_validation_are_collected_once():
    found = [{"type": "t", "loc": (key,), "msg": "is wrong", "input": 1} for key in ("a", "b")]
    errors = Mock(**{"errors.return_value": found})
    assert describe(errors, Recipe) == "a: is wrong (found 1) (also wrong: b)"
    assert errors.errors.call_count == 1


def test_a_number_for_a_section_names_its_first_value():
    with pytest.raises(RecipeError, match=r"stage2\.lora: a section, .* such as stage2\.lora\.rank=64"):
        load_recipe("micro", ["stage2.lora=64"])


def test_a_word_that_yaml_reads_as_false_is_a_word():
    recipe = load_recipe("micro", ["run.mixed_precision=no", "run.compile=off"])
    assert (recipe.run.mixed_precision, recipe.run.compile) == ("no", "off")
    with pytest.raises(RecipeError, match=r"run\.mixed_precision: "):
        load_recipe("micro", ["run.mixed_precision=true"])


def test_overrides_are_typed():
    recipe = load_recipe("micro", ["stage1.lr=1e-4", "stage2.lora=null", "sampling.prompts=[a, b]"])
    assert recipe.stage1.lr == 1e-4
    assert recipe.stage2.lora is None
    assert recipe.sampling.prompts == ("a", "b")


def test_differences_leave_out_what_a_resumed_run_may_change():
    old = load_recipe("micro")
    assert differences(old, load_recipe("micro", ["stage1.max_steps=7", "run.log_every=3"])) == []
    changed = differences(old, load_recipe("micro", ["stage1.lr=0.5"]))
    assert changed == [f"stage1.lr: {old.stage1.lr} -> 0.5"]


def test_recipes_are_read_without_torch():
    code = (
        "import sys, davae.recipes, davae.cli; davae.recipes.load_recipe('micro'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_section_that_is_null_takes_values(tmp_path: Path):
    """A run's `recipe.yaml` has every section that is off as null; `--set` turns it on."""
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(load_recipe("micro", ["stage2.lora=null"])))
    found = load_recipe(str(resolved), ["stage2.lora.rank=3", "stage1.polish.max_steps=5"])
    assert isinstance(found, Recipe)
    assert found.stage2.lora is not None
    assert found.stage1.polish is not None
    assert (found.stage2.lora.rank, found.stage1.polish.max_steps) == (3, 5)
    values = load_recipe(str(resolved)).model_dump(mode="json")
    set_values(values, {"stage2__lora__rank": 4, "stage1": {"polish": {"max_steps": 6}}})
    assert values["stage2"]["lora"] == {"rank": 4}
    assert values["stage1"]["polish"] == {"max_steps": 6}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "clothing",
            ["stage1.lambda_adv=0.1", "stage1.gan_layers=5", "stage1.crop=64", "stage1.gan_start=1"],
            "stage1.gan_layers: 5 .* use 4",
        ),
        (
            "clothing",
            ["stage1.lambda_adv=0.1", "stage1.polish.crop=16", "stage1.crop=64"],
            "stage1.polish.gan_layers: 3 layers need 24 pixels, .* sees 16; use 2",
        ),
        (
            "imagenette128-scratch",
            ["vae.lambda_adv=0.1", "vae.gan_layers=6", "vae.gan_start=1"],
            "vae.gan_layers: .*128; use 5",
        ),
    ],
)
def test_a_discriminator_with_too_many_layers_is_named_before_anything_runs(
    recipe, overrides: list[str], message: str
):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)
    assert load_recipe(recipe, [one.replace("adv=0.1", "adv=0") for one in overrides])
