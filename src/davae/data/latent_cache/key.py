"""Key of a cache: hashes of its inputs, part by part, so that changes can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data.images import ImageSource
from davae.data.tables import TableSource, table_content

PARTS = {
    "autoencoder": "the autoencoder's weights or config",
    "data": "the images or their captions",
    "preprocessing": "the preprocessing",
    "text": "the model that the text encoders belong to",
}
FORMER_DATA = "data_before"  # the hash under which earlier versions wrote a cache of the same data
Key = Mapping[str, Any]  # a part of PARTS -> a hash, or plain values by name


def hash_values(*parts: Any) -> str:
    """Return a short hash of plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_weights(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> str:
    """Return a hash of a model's tensors, bit by bit, and of its config."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_images(source: ImageSource, indices: Sequence[int]) -> str:
    """Return a hash of the chosen images' names, bytes and captions, without their pixels."""
    return _hash_parts(part for i in indices for part in (source.key(i).encode(), source.identity(i)))


def hash_former(source: TableSource, indices: Sequence[int]) -> str:
    """Return the hash of a table as earlier versions made it, whose caches still open."""
    return _hash_parts(part for index in indices for part in source.former(index))


def hash_shards(files: Sequence[Path]) -> str:
    """Return a hash of files: both ends of shards, and all of the statistics."""
    small = [file.read_bytes() for file in files if file.suffix != ".safetensors"]
    return _hash_parts([table_content("", files) or b"", *small])


def _hash_parts(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def changes(old: Key, new: Key) -> list[str]:
    """Return the differences of two keys in words, with options such as `flip: False -> True`."""
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
    """Return a key as it is after JSON."""
    return json.loads(json.dumps(dict(key), sort_keys=True))
