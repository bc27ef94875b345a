"""Recipe files from strangers: plain values within bounds, or one readable line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from davae.commands.verbs import check_value
from davae.errors import RecipeError
from davae.recipes import load_recipe, validate
from davae.recipes.base import BaseRecipe
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.recipes.upgrade import Recipe
from davae.recipes.values import read_value, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with its aliases written out"),
        ("a: &a [*a]", "contains itself|not valid YAML"),
        ("a: &a {b: *a}", "contains itself|not valid YAML"),
        ("[" * 5000, "nested more than 32 levels|not valid YAML"),
        ("{a: " * 5000, "nested more than 32 levels|not valid YAML"),
        ("- " * 3000 + "x", "nested more than 32 levels"),
        ("x" * 300_000, "more than 256 KiB"),
        ("a: 1\nb: 2\na: 3", "key 'a' occurs twice"),
        ("s: {lr: 1, lr: 2}", "key 'lr' occurs twice"),
        ("<<: {a: 1}\n<<: {b: 2}", "occurs twice"),
        ("<<: 5", "not valid YAML"),
        ("yes: 1", "key 'yes' is not text"),
        ("1: 1", "key '1' is not text"),
        ("? [a, b]\n: 1", "is not text"),
        ("? {a: b}\n: 1", "is not text"),
        ("a: !!python/object/apply:os.system [touch ran]", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: !unknown 1", "not valid YAML"),
        ("a: 1" + "0" * 400, "digits, more than 18"),
        ("a: 0x" + "f" * 5000, "digits, more than 18"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!timestamp 2001-99-99", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ('a: "\\0"', "a character that is not text"),
        ("a: [1, 2", "not valid YAML"),
        ("a: 'open", "not valid YAML"),
        ("a:\n\t- 1", "not valid YAML"),
        ("a: 1\n--- b", "not valid YAML"),
        ("*a", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_one_line(text: str, message: str) -> None:
    before = time.perf_counter()
    with pytest.raises(RecipeError, match=message) as caught:
        read_yaml(text, "recipe x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.perf_counter() - before < 5


def test_yaml_within_the_bounds_is_read() -> None:
    assert read_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n  d: [*x, *x]", "x") == {
        "a": {"b": 1},
        "c": {"b": 2, "d": [{"b": 1}, {"b": 1}]},
    }
    assert read_yaml(b"\xef\xbb\xbfa: \xc3\xa4", "x") == {"a": "ä"}
    assert [read_value(text, "x") for text in ("1e-4", "1", "a", "[a, 1e3]", "null", "off")] == [
        *(1e-4, 1, "a"),
        ["a", "1e3"],
        None,
        False,
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"name: \xff", "is not UTF-8 text"),
        ("name: x".encode("utf-16"), "is not UTF-8 text"),
        (b"", "must be a mapping"),
        (b"- a", "must be a mapping"),
        (b"kind: [upgrade]", "kind '.*' is unknown"),
        (b"kind: {a: b}", "kind '.*' is unknown"),
        (b"\0" * 100, "not valid YAML|not text"),
    ],
)
def test_hostile_recipe_files_are_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_what_is_no_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(str(tmp_path / "d.yaml"))
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match="must be a mapping"):
        validate(["a"], "x")


FLOATS = """
stage1.lr stage1.weight_decay stage1.max_grad_norm stage1.ema_decay stage1.lambda_lpips stage1.lambda_l1
stage1.lambda_adv stage1.lambda_kl stage1.gan_lr stage1.lambda_align stage1.detail_dropout stage2.lr
stage2.caption_dropout stage2.timestep_mean stage2.timestep_std stage2.timestep_shift stage2.lora.alpha
stage2.new_weight_lr_multiplier stage2.min_snr_gamma sampling.guidance_scale data.holdout
"""


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e300"])
def test_numbers_are_finite(value: str) -> None:
    overrides = [f"{path}={value}" for path in FLOATS.split()]
    for text in (*overrides, f"data.caption_weights={{a: {value}}}", f"stage1.betas=[0.1, {value}]"):
        with pytest.raises(RecipeError) as caught:
            load_recipe("micro", [text])
        assert text.partition("=")[0].split(".")[-1] in str(caught.value), text
        assert "\n" not in str(caught.value)


def test_every_number_of_a_recipe_is_bounded() -> None:
    """No integer field without an upper bound, in any section of any kind of recipe."""
    schemas = [kind.model_json_schema() for kind in (Recipe, BaseRecipe, SuperResolutionRecipe)]
    open_ended = []

    def look(node: object, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "const", "enum"} & node.keys():
                open_ended.append(path)
            for key, value in node.items():
                look(value, f"{path}/{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                look(value, f"{path}/{number}")

    look(schemas, "")
    assert not open_ended


@pytest.mark.parametrize(
    "override",
    [
        "stage1.batch_size=10000000000",
        "stage2.batch_size=70000",
        "stage2.max_steps=99999999999",
        "base.resolution=1048576",
        "sampling.steps=100000",
        "detail_channels=99999999",
        "stage2.lora.rank=1000000",
        "data.num_workers=100000",
        "run.seed=-1",
        "run.seed=999999999999999999999",
        "name=../outside",
        "name=/etc/x",
        'name="a\\nb"',
        "name=..",
        "name=''",
    ],
)
def test_absurd_values_are_one_line(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("micro", [override])
    assert override.partition("=")[0].split(".")[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance", float("inf")),
        ("guidance", float("nan")),
        ("guidance", 1e300),
        ("seed", -1),
        ("steps", 10**7),
        ("num", 10**12),
        ("resolution", -8),
        ("resolution", 10**6),
        ("unknown", 10**15),
        ("prompt", "\udcff"),
    ],
)
def test_options_of_verbs_are_finite_and_bounded(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"--{name}: "):
        check_value(name, f"--{name}", value)


def test_every_verb_checks_its_options() -> None:
    import typer

    from davae.cli import app
    from davae.commands.verbs import Verb

    def leaves(command: object) -> list[object]:
        inner = getattr(command, "commands", None)
        return [command] if inner is None else [leaf for one in inner.values() for leaf in leaves(one)]

    assert all(isinstance(leaf, Verb) for leaf in leaves(typer.main.get_command(app)))
