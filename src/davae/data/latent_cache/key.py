"""What a cache was made from, part by part, so that a stale one can say what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from davae.data.images import ImageSource
from davae.data.tables import TableSource

PARTS = {
    "autoencoder": "the autoencoder's weights or config",
    "data": "the pictures or what is said of them",
    "preprocessing": "the preprocessing",
    "text": "the model that the text encoders belong to",
}
FORMER_DATA = "data_before"  # the hash under which earlier versions wrote a cache of the same data
Key = Mapping[str, Any]  # a part of PARTS -> a hash, or plain values by name


def hash_values(*parts: Any) -> str:
    """A short hash of plain values: what something was made from."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_weights(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> str:
    """A hash of a model's tensors, bit by bit, and of its config."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_pictures(source: ImageSource, indices: Sequence[int]) -> str:
    """A hash of the chosen pictures' names, sizes in bytes and captions, in order. Pixels are not read."""
    digest = hashlib.sha256()
    for index in indices:
        for part in (source.key(index).encode(), source.identity(index)):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def hash_former(source: TableSource, indices: Sequence[int]) -> str:
    """Return what `hash_pictures` gave for a table before files were hashed by content; caches of then still open."""
    digest = hashlib.sha256()
    for index in indices:
        for part in source.former(index):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def changes(old: Key, new: Key) -> list[str]:
    """What differs between two keys, in words; options of the preprocessing by name, `flip: False -> True`."""
    found: list[str] = []
    for part, words in PARTS.items():
        before, after = old.get(part), new.get(part)
        if before == after or (part == "data" and before == new.get(FORMER_DATA, after)):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
            words += f" ({', '.join(f'{n}: {before.get(n)} -> {after.get(n)}' for n in names)})"
        found.append(words)
    return found


def plain_key(key: Key) -> dict[str, Any]:
    """A key as it reads back from JSON."""
    return json.loads(json.dumps(dict(key), sort_keys=True))
