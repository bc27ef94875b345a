"""The reference pages hold every recipe key, verb and option, and are those of the code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from davae.cli import app
from davae.errors import RecipeError
from davae.recipes import load_recipe, shipped_recipes

DOCS = Path(__file__).parents[2] / "docs"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> Any:
    return script("make_reference")


def test_the_table_of_families_is_that_of_the_code_and_its_outcomes():
    table = script("make_family_table")
    outcomes = json.loads(table.OUTCOMES.read_text(encoding="utf-8"))
    assert table.TARGET.read_text(encoding="utf-8") == table.page(outcomes), "run: python docs/make_family_table.py"


@pytest.mark.parametrize("name", ["recipes.md", "commands.md"])
def test_the_pages_are_those_of_the_code(name: str, maker: Any):
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == maker.PAGES[name](), "run: python docs/make_reference.py"


def test_every_key_is_explained(maker: Any):
    for _, _, model in maker.KINDS:
        for path, field in maker.keys(model):
            assert field.description, path
            assert field.description.endswith("."), path


def test_every_key_of_every_recipe_is_in_the_reference(maker: Any):
    page = maker.recipes_page()

    def check(values: dict[str, Any], prefix: str = "") -> None:
        for key, value in values.items():
            path = f"{prefix}{key}"
            if path.startswith("base.train."):
                path = path.removeprefix("base.train.")
            assert f"| `{path}` |" in page, path
            if isinstance(value, dict) and key != "caption_weights":
                check(value, f"{path}.")

    for name in shipped_recipes():
        check(load_recipe(name).model_dump(mode="json"))


def test_every_verb_and_option_is_in_the_reference(maker: Any):
    page = maker.commands_page()
    found = list(maker.verbs(maker.typer.main.get_command(app)))
    assert len(found) > 30
    for words, verb in found:
        section = page.split(f"## davae {words}\n")[1].split("\n## ")[0]
        assert verb.help.strip().splitlines()[0] in section
        for option in verb.params:
            if option.param_type_name == "option" and option.name not in ("help", "verbose", "quiet"):
                assert f"`{option.opts[0]}`" in section, (words, option.name)
                assert option.help, f"{words} {option.name}: an option without help"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_is_printed_to_be_copied(name: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["recipes", name])
    assert result.output == shipped_recipes()[name]
    (tmp_path / "mine.yaml").write_text(result.output)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)


def test_recipes_are_listed_with_whole_sentences():
    shown = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for name, text in shipped_recipes().items():
        assert name in words
        assert text.splitlines()[0].removeprefix("#").split()[-1] in words, "the end of its first line"
    wrong = CliRunner().invoke(app, ["recipes", "micr"])
    assert isinstance(wrong.exception, RecipeError)
    assert "did you mean 'micro'" in str(wrong.exception)


def test_no_recipe_calls_itself_what_it_is_not():
    for name, text in shipped_recipes().items():
        assert "had none" not in text, name
        assert yaml.safe_load(text)["name"] == name
