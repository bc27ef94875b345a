"""Import of the latent shards that LightningDiT's extraction script writes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from davae.data.latent_cache.key import Key
from davae.data.latent_cache.meta import CacheMeta, Team, prepare_cache
from davae.data.latent_cache.not_finite import LATENT, check_many, stored
from davae.data.latent_cache.write import ChannelStatistics, merge_index, merged_meta, save_latents
from davae.errors import DataError

PATTERN = "latents_rank*_shard*.safetensors"
STATISTICS = "latents_stats.pt"
BLOCK = 1024  # latents copied at a time


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Return (mean, std), each (channels,), of a `latents_stats.pt`.

    Raises:
        DataError: a file that would run code, is not a statistics file, or has another number of channels.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give a latents_stats.pt")
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (values[name].flatten().float() for name in ("mean", "std"))
    except (
        *(pickle.UnpicklingError, LookupError, TypeError, AttributeError, RuntimeError),
        *(EOFError, OSError, ValueError, AssertionError, SafetensorError),
    ) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path} holds no plain tensors named mean and std: {reason}") from error
    if len(mean) != channels or len(std) != channels:
        raise DataError(f"{path} has statistics of {len(mean)} channels, the latents have {channels}")
    if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise DataError(f"{path}: mean and std must be finite, and std above 0")
    return mean, std


class _Shard:
    """Shapes of one shard, read from its header."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt") as stream:
                names = set(stream.keys())
                if not {"latents", "labels"} <= names:
                    raise DataError(f"shard {path} has no tensors named latents and labels; it has {sorted(names)}")
                self.shape = tuple(stream.get_slice("latents").get_shape())
                self.flipped = "latents_flip" in names
                twins = tuple(stream.get_slice("latents_flip").get_shape()) if self.flipped else self.shape
        except SafetensorError as error:
            raise DataError(f"shard {path} is not a whole safetensors file: {error}") from error
        if len(self.shape) != 4 or twins != self.shape:
            odd = self.shape if len(self.shape) != 4 else twins
            raise DataError(f"shard {path} holds latents of shape {odd}; expected (images, channels, side, side)")

    def labels(self, num_classes: int) -> list[int]:
        """Return the classes, or raise a DataError for too few or unknown ones."""
        with safe_open(self.path, framework="pt") as stream:
            own = stream.get_tensor("labels").flatten().long()
        if len(own) != self.shape[0]:
            raise DataError(f"shard {self.path} has {len(own)} labels for {self.shape[0]} latents")
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < num_classes:
            odd = own[(own < 0) | (own >= num_classes)][0]
            raise DataError(f"shard {self.path} has class label {int(odd)}, the model has {num_classes} classes")
        return own.tolist()


def open_shards(source: Path, channels: int, num_classes: int, side: int | None = None) -> list[_Shard]:
    """Open a folder's shards, or raise a DataError for one that fits neither model nor others.

    Headers and classes are read.

    Args:
        source: the folder.
        channels, num_classes: what the model takes.
        side: of the model's latents, (channels, side, side); None takes any.
    """
    shards = [_Shard(path) for path in sorted(source.glob(PATTERN))]
    if not shards:
        raise DataError(f"{source} has no latent shards ({PATTERN})")
    shape = shards[0].shape[1:]
    for shard in shards:
        if shard.shape[1:] != shape or shard.flipped != shards[0].flipped:
            raise DataError(f"shard {shard.path} holds latents {shard.shape[1:]}, the first shard {shape}")
    if shape[0] != channels:
        raise DataError(f"{source} holds latents of {shape[0]} channels, the model takes {channels}")
    if side is not None and shape[1:] != (side, side):
        raise DataError(f"{source} holds latents of {shape[1]}x{shape[2]}, the model takes {side}x{side}")
    for shard in shards:
        shard.labels(num_classes)
    return shards


def import_shards(
    source: Path,
    target: Path,
    *,
    channels: int,
    num_classes: int,
    key: Key,
    dtype: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> CacheMeta:
    """Copy raw latents, their flipped twins and labels into a cache folder, block by block.

    Statistics are those of `latents_stats.pt` where it lies next to the shards, else measured. The caller seals the cache.

    Args:
        channels, num_classes: what the model takes.

    Raises:
        DataError: no shards, shapes that differ, channels or labels that do not fit the model.
    """
    shards = open_shards(source, channels, num_classes)
    given = source / STATISTICS
    statistics = read_statistics(given, channels) if given.is_file() else None

    prepare_cache(target, key, Team())
    names = ["latents", "latents_flip"] if shards[0].flipped else ["latents"]
    total, over, number = sum(shard.shape[0] for shard in shards) * len(names), 0, 0
    for name in names:
        for shard in shards:
            with safe_open(shard.path, framework="pt") as stream:
                labels = shard.labels(num_classes)
                rows = stream.get_slice(name)
                for start in range(0, shard.shape[0], BLOCK):
                    block: Tensor = rows[start : start + BLOCK]
                    values, faults = stored(block.float().numpy(), dtype)
                    kept = [row for row, fault in enumerate(faults) if fault is None]
                    lost = {
                        f"{shard.path.name}, {name}[{start + row}]": f"{LATENT}: {fault}"
                        for row, fault in enumerate(faults)
                        if fault is not None
                    }
                    measured = ChannelStatistics(channels)
                    if kept:
                        measured.update(block[kept])
                    own = [labels[start + row] for row in kept]
                    save_latents(target, number, 0, values[kept], [""] * len(own), own, measured, lost, key=key)
                    number += 1
            over += shard.shape[0]
            on_batch(over, total)
    merge_index(target)
    meta = merged_meta(target, key, given=statistics)
    check_many(meta.skipped, total)
    return meta
