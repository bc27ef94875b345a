"""Official checkpoint files and their configs, read without running code of theirs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.errors import ModelError, RecipeError
from davae.pretrained.hub_errors import brief
from davae.recipes.values import read_yaml_file

State = dict[str, Tensor]
WRAPPERS = ("ema", "model", "state_dict")  # where training scripts keep the weights, the average first
# what torch.load raises over damaged files and over text that happens to begin as a pickle
UNREADABLE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError)
PREFIXES = ("module.", "_orig_mod.")  # left behind by data-parallel and compiled models


def load_state(path: Path) -> State:
    """Return the tensors of a checkpoint, the averaged weights where the file has them.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or `.ckpt` file.

    Raises:
        ModelError: no such file, not readable without running code, no tensors inside, or numbers that are not finite.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    if (kind := kind_of_file(path)) is not None:
        raise ModelError(f"checkpoint {path}: it is {kind}; give a .safetensors, .pt, .pth or .ckpt file of weights")
    state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    for name, value in state.items():
        numbers = value.float() if value.element_size() == 1 else value  # float8 has no isfinite
        if value.is_floating_point() and not bool(torch.isfinite(numbers).all()):
            raise ModelError(f"checkpoint {path}: {name} contains NaN or infinite values; the file is damaged")
    return strip_prefixes(state)


def _safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"checkpoint {path} is not a whole safetensors file: {error}") from error


def _pickled(path: Path) -> State:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL" in str(error) else "unknown objects"
        raise ModelError(
            f"checkpoint {path} holds more than tensors ({objects}): reading it would run its code, which davae never "
            "does; save its state dict alone and try again"
        ) from error
    except UNREADABLE as error:
        raise ModelError(f"checkpoint {path} cannot be read: {brief(error)}") from error
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"checkpoint {path} holds no state dict")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


# first bytes of files that are taken for checkpoints by mistake; a pickle begins with b"\x80" or, in a zip, with b"PK"
KINDS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a sound",
    b"BM": "a BMP image",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"<!DOCTYPE": "a web page; the download needs a login, or another address",
    b"<!doctype": "a web page; the download needs a login, or another address",
    b"<html": "a web page; the download needs a login, or another address",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
    b"GGUF": "a GGUF file, whose weights are quantised",
}


def kind_of_file(path: Path) -> str | None:
    """Return the kind of a file by its first bytes, None for one that may contain weights."""
    with path.open("rb") as stream:
        start = stream.read(32)
    if not start:
        return "empty"
    if start.lstrip()[:1] in (b"{", b"[") and path.suffix != ".safetensors":
        return "JSON"
    if start[4:12] in (b"ftypavif", b"ftypheic", b"ftypisom", b"ftypmp42"):
        return "an image or a film"
    return next((kind for first, kind in KINDS.items() if start.startswith(first)), None)


def strip_prefixes(state: State) -> State:
    """Return a state dict without the prefixes of wrappers."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_strictly(model: nn.Module, state: State, what: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        model: the module, loaded in place.
        state: weights.
        what: the expected model, for the message.

    Raises:
        ModelError: names the keys that are missing, left over, or of another shape.
    """
    own = model.state_dict()
    problems = [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unknown {name}" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ModelError(f"the weights do not fit {what}: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(state)


def read_section(path: Path, key: str) -> dict[str, Any]:
    """Return the first mapping in a YAML file, at any depth, that contains a key.

    Args:
        path: the file.
        key: the key.

    Raises:
        ModelError: a file that cannot be read, or one without the key.
    """
    try:
        pending: list[Any] = [read_yaml_file(path, f"config {path}")]
    except RecipeError as error:
        raise ModelError(str(error)) from error
    while pending:
        node = pending.pop(0)
        if isinstance(node, dict):
            if key in node:
                return node
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    raise ModelError(f"config {path} has no section with {key}")
