"""Read, override, resolve and save recipes, with one-line errors by dotted path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from davae.errors import RecipeError
from davae.recipes.base import NAMED, OWN, BaseRecipe
from davae.recipes.fields import Section
from davae.recipes.sections import Data
from davae.recipes.stages import POLISH
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.recipes.upgrade import Recipe
from davae.recipes.values import read_value, read_yaml, read_yaml_file

AnyRecipe = Recipe | BaseRecipe | SuperResolutionRecipe
KINDS: dict[str, type[AnyRecipe]] = {"upgrade": Recipe, "base": BaseRecipe, "super-resolution": SuperResolutionRecipe}

FAMILIES = ("sd3", "lightningdit")  # tags that pydantic puts into the path of an architecture's fields
TAGS = (*FAMILIES, NAMED, OWN)  # all that it puts there


def shipped_recipes() -> dict[str, str]:
    """Return name -> YAML text of every recipe in the package."""
    folder = files("davae.recipes")
    entries = sorted((e for e in folder.iterdir() if e.name.endswith(".yaml")), key=lambda e: e.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in entries}


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Return a validated recipe by its shipped name or file, with `a.b=c` overrides.

    Raises:
        RecipeError: unknown name, unreadable YAML, unknown key, wrong type, impossible values.
    """
    values = read_recipe(name_or_path)
    for override in overrides:
        apply_override(values, override)
    return validate(values, name_or_path)


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Return the values of a shipped recipe or a YAML file, not validated.

    Raises:
        RecipeError: unknown name, unreadable YAML, no mapping.
    """
    shipped = shipped_recipes()
    path = Path(name_or_path)
    if name_or_path in shipped:
        values = read_yaml(shipped[name_or_path], f"recipe {name_or_path}")
    elif path.suffix in {".yaml", ".yml"}:
        values = read_yaml_file(path, f"recipe file {path}")
    else:
        raise RecipeError(
            f"unknown recipe '{name_or_path}'{suggestion(name_or_path, shipped, '`davae recipes` lists them')}"
        )
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name_or_path} must be a mapping of keys to values")
    return values


def set_values(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set values of a recipe in place.

    Args:
        values: the recipe's values.
        changes: by dotted path; `__` in a name counts as a dot, and a mapping changes the values of a section one by one.

    Raises:
        RecipeError: a path that leads through a value.
    """
    for path, change in changes.items():
        keys = path.replace("__", ".").split(".")
        node = values
        for key in keys[:-1]:
            node = _section_at(node, key, path)
        if isinstance(change, Mapping):
            section = node.setdefault(keys[-1], {})
            if not isinstance(section, dict):
                section = node[keys[-1]] = {}
            set_values(section, change)
        else:
            node[keys[-1]] = str(change) if isinstance(change, Path) else change


def validate(values: Any, name: str) -> AnyRecipe:
    """Return the recipe of a mapping's `kind`.

    Raises:
        RecipeError: no mapping, or a wrong field, the first one by its dotted path.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name} must be a mapping of keys to values")
    kind = values.get("kind", "upgrade")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"recipe {name}: kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    model = KINDS[kind]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {describe(error, model)}") from error


def load_data(source: str, overrides: Iterable[str] = (), start: Data | None = None) -> Data:
    """Return a section `data` on its own, for verbs that read images without a recipe.

    Args:
        source: its `source`.
        overrides: `data.x=y` each.
        start: section whose values hold where no override changes them; the defaults, unless given.

    Raises:
        RecipeError: an override of another section, an unknown option or an impossible value, by its dotted path.
    """
    values: dict[str, Any] = {"data": {} if start is None else start.model_dump(mode="json", exclude_defaults=True)}
    for override in overrides:
        if not override.strip().startswith("data."):
            raise RecipeError(f"--set {override.partition('=')[0]}: this verb takes options of data alone, data.x=y")
        apply_override(values, override)
    values["data"]["source"] = source
    try:
        return DataAlone.model_validate(values).data
    except ValidationError as error:
        raise RecipeError(describe(error, DataAlone)) from error


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation's first error, `a.b.c: what is wrong`, and the paths of the others."""
    first, parts = (errors := error.errors())[0], [str(part) for part in errors[0]["loc"]]
    paths = [".".join(str(p) for p in one["loc"] if p not in TAGS) or "recipe" for one in errors]
    path, *others = dict.fromkeys(paths)
    more = f" (also wrong: {', '.join(others)})" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggestion(parts[-1], _fields_at(model, parts[:-1]))}{more}"
    message, found = first["msg"].removeprefix("Value error, "), first.get("input")
    if first["type"] == "model_type" and type(found) in (int, float) and (keys := _fields_at(model, parts)):
        message = f"a section, whose values are set one by one, such as {path}.{keys[0]}={found}"
    shown = "" if isinstance(found, (dict, list, BaseModel)) else f" (found {found!r})"
    return f"{path}: {message}{shown}{more}"


def _fields_at(model: type[BaseModel], parts: list[str]) -> list[str]:
    """Return the keys of the section at a path, in which families pick an alternative."""
    alternatives = [model]
    for part in parts:
        if part in FAMILIES:
            alternatives = [
                m for m in alternatives if part in getattr(m.model_fields["family"].annotation, "__args__", ())
            ]
            continue
        if part in TAGS:
            continue
        annotations = [m.model_fields[part].annotation for m in alternatives if part in m.model_fields]
        alternatives = [c for a in annotations for c in _sections_in(a)]
    return [name for m in alternatives for name in m.model_fields]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def suggestion(word: str, known: Iterable[str], then: str = "") -> str:
    """Return the question after known words that are near or begin alike, and then `then`."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1) or [n for n in names if word and n.startswith(word)][:3]
    question = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";" if then else ""
    return f"{question} {then}".rstrip()


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` (c is YAML) in place."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set takes a.b=value, found '{override}'")
    node = values
    for key in keys[:-1]:
        node = _section_at(node, key, f"--set {path}")
    node[keys[-1]] = read_value(text, f"--set {path}")


def _section_at(node: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    """Return a section of a recipe's values, a new one where it is absent or null.

    Raises:
        RecipeError: a value is there; `path` names the place.
    """
    if node.get(key) is None:
        node[key] = {}
    section = node[key]
    if not isinstance(section, dict):
        raise RecipeError(f"{path}: '{key}' is a value, not a section")
    return section


def dump_recipe(recipe: AnyRecipe) -> str:
    """Return the resolved recipe as YAML, from which an equal recipe is read."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What may change between two runs on one folder: how long and how often, never what is trained. Steps of `align` may not:
# whatever `dit` has learned since would hide them.
RESUMABLE = (
    *(f"{section}.max_steps" for section in ("vae", "dit", "stage1", POLISH, "stage2", "network")),
    "run.log_every", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_every", "run.sample_every",
    "run.trackers", "run.stop_signals", "run.ema_device", "run.compile", "run.find_unused_parameters",
    "stage2.validate_every", "stage2.validate_pictures", "data.num_workers", "data.require_captions",
    "cache.batch_size", "report", "sampling", "hardware",
)  # fmt: skip


def differences(old: AnyRecipe, new: AnyRecipe, free: tuple[str, ...] = RESUMABLE) -> list[str]:
    """Return the differences of two recipes, `path: old -> new`, but not of `free` paths.

    A polish that only the new recipe has does not count: it begins from what the old one has trained.

    Args:
        old, new: the recipes.
        free: dotted paths that may differ.
    """
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    if POLISH in before:  # it is null there
        free = (*free, POLISH)
    elif POLISH in after:  # one difference, with the values to give again
        own = [key for key in before if key.startswith(f"{POLISH}.") and before[key] is not None]
        before[POLISH] = ", ".join(f"{key.removeprefix(f'{POLISH}.')}={before.pop(key)}" for key in own)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in changed
        if not any(key == name or key.startswith(f"{name}.") or key.endswith(f".{name}") for name in free)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class DataAlone(Section):
    """The section `data` without a recipe around it."""

    data: Data = Field(description="Images.")
