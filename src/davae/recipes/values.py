"""YAML from strangers: plain values within bounds, or one readable line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from davae.errors import RecipeError

MAX_BYTES = 1 << 18  # the largest shipped recipe has 4 KB
MAX_NODES = 50_000  # with every alias written out
MAX_DEPTH = 32
MAX_DIGITS = 18  # what a 64-bit number holds


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same loader on libyaml, 20 times faster


class _Loader(_Base):
    """SafeLoader that refuses a key given twice, keys that are not text, and endless numbers."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(str(node.value)) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number has {len(str(node.value))} digits, more than {MAX_DIGITS}", node.start_mark
            )
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a key that occurs twice or is not text, before `<<` merges more keys in."""
    seen: set[str] = set()
    for key, _ in node.value:
        merges = key.tag == "tag:yaml.org,2002:merge"
        if not merges and key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise yaml.constructor.ConstructorError(
                None, None, f"key {shown!r} is not text; put it in quotes", key.start_mark
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
        seen.add(key.value)


def read_yaml_file(path: Path, what: str) -> Any:
    """Read the values of a YAML file.

    Args:
        what: names the file in messages.

    Raises:
        RecipeError: a file that is missing, unreadable, too large or not UTF-8, and what `read_yaml` refuses.
    """
    if not path.exists():
        raise RecipeError(f"{what} does not exist")
    if not path.is_file():
        raise RecipeError(f"{what} is not a file")
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{what} cannot be read: {error.strerror or error}") from error
    return read_yaml(data, what)


def read_yaml(data: bytes | str, what: str) -> Any:
    """Read YAML: null, truth values, numbers, text, dates, lists and mappings with text keys.

    Args:
        what: names the source in messages.

    Raises:
        RecipeError: not UTF-8, not YAML, a tag that is not plain YAML, a key twice, or more bytes, nodes (with aliases
            written out) or levels than the bounds of this module.
    """
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{what} has more than {MAX_BYTES >> 10} KiB; a recipe is a few lines of settings")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        _check_bounds(text, what)
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or number that does not exist
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{what} is not valid YAML: {' '.join(str(error).split())[:300]}") from error


def read_value(text: str, what: str) -> Any:
    """Read one YAML value of the command line, with `1e-4`, a text in YAML 1.1, as a number.

    Raises:
        RecipeError: as `read_yaml`.
    """
    value = read_yaml(text, what)
    if isinstance(value, str) and len(value) < 40 and text.strip()[:1] not in ("'", '"'):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_bounds(text: str, what: str) -> None:
    """Refuse what grows when it is built: nested deeply, or with aliases of aliases.

    Reads the stream of events, whose parser keeps its own stack; each open collection counts its nodes.
    """
    sizes: dict[str, int] = {}  # nodes below a finished anchor
    stack: list[tuple[str | None, int]] = []  # (anchor, nodes so far) of every open collection
    for event in yaml.parse(text, _Base):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            stack.append((event.anchor, 1))
            sizes.pop(event.anchor or "", None)
            if len(stack) > MAX_DEPTH:
                raise RecipeError(f"{what} is nested more than {MAX_DEPTH} levels deep")
            continue
        anchor: str | None = None
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (name for name, _ in stack):
                raise RecipeError(f"{what}: *{event.anchor} contains itself")
            nodes = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            _check_text(event.value, what)
            anchor, nodes = event.anchor, 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, nodes = stack.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = nodes
        if stack:
            name, before = stack[-1]
            stack[-1] = (name, before + nodes)
        if nodes > MAX_NODES or (stack and stack[-1][1] > MAX_NODES):
            raise RecipeError(f"{what} has more than {MAX_NODES} values with its aliases written out")


def _check_text(text: str, what: str) -> None:
    """Refuse text that no file can hold: NUL and halves of surrogate pairs."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError(
            f"{what}: {text[:60]!r} contains a character that is not text (NUL or half a surrogate pair)"
        )
