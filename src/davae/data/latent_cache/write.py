"""Writing of a latent cache: latents, captions, classes, statistics, text embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from davae.data.batches import chosen_workers
from davae.data.images import ImageDataset, collate
from davae.data.latent_cache.caption_table import CaptionTable, pack, write_table
from davae.data.latent_cache.key import Key, plain_key
from davae.data.latent_cache.meta import LABELS, NO_LABEL, CacheMeta, Team, prepare_cache
from davae.data.latent_cache.not_finite import (
    ALWAYS,
    GONE,
    LATENT,
    NOT_FINITE,
    check_many,
    is_finished,
    lost_captions,
    stored,
)
from davae.data.latent_cache.shard_files import (
    CacheShard,
    latent_name,
    latent_shards,
    made_from,
    save_array,
    save_shard,
    shard_key,
)
from davae.data.latent_cache.shard_plan import begun_with, planned_shards
from davae.data.latent_cache.text_rows import CAPTIONS, captions_hash, is_finished_text, packed
from davae.errors import DataError, UnreadableImage
from davae.files.atomic import require_space
from davae.files.reading import load_json

Watch = Callable[[int, int], None]
TEXT_BYTES = 1 << 28  # of one shard of text embeddings


class ChannelStatistics:
    """Mean and variance per channel in float64, however the data are cut and merged."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)  # summed squared distances from the mean

    def update(self, latents: Tensor) -> None:
        """Add latents (B,c,h,w)."""
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)  # (c, B*h*w)
        mean = values.mean(1)
        self.merge(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add another part (Chan, Golub and LeVeque 1979, Eq. 2.1)."""
        if not count:
            return
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta.square() * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / max(1, self.count)).sqrt()


# -- latents ---------------------------------------------------------------------------------------------------------


def save_latents(
    folder: Path,
    number: int,
    group: int,
    latents: np.ndarray,
    captions: Sequence[str],
    labels: Sequence[int | None],
    statistics: ChannelStatistics,
    skipped: dict[str, str],
    images: Sequence[int] | None = None,
    key: Key | None = None,
) -> None:
    """Write one shard: latents (n,c,h,w), captions, labels (n,), statistics, images, key.

    Args:
        folder: of the cache.
        number, group: of the shard, and of its bucket.
        latents: (n,c,h,w) as they are kept.
        captions, labels: of the n items; None where an item has no class.
        statistics: of these latents.
        skipped: name of each unusable image -> why.
        images: (n,) number of each item's image.
        key: of the cache.
    """
    texts, ends = pack(captions)
    tensors = {
        "latents": latents,
        "texts": texts,
        "ends": ends,
        "labels": np.asarray([NO_LABEL if label is None else label for label in labels], np.int64),
        "count": np.asarray([statistics.count], np.int64),
        "mean": statistics.mean.numpy(),
        "squares": statistics.squares.numpy(),
    }
    if images is not None:
        tensors["images"] = np.asarray(images, np.int64)
    if key is not None:
        tensors["key"] = shard_key(key)
    save_shard(folder / latent_name(group, number), tensors, {"skipped": json.dumps(skipped)}, rows=("latents",))


def _asking_for_space(
    encode: Callable[[Tensor], Tensor], folder: Path, rows: int, itemsize: int
) -> Callable[[Tensor], Tensor]:
    """Return `encode` with a check of the disk's room for all rows after its first batch."""
    checked: list[bool] = []

    def asking(images: Tensor) -> Tensor:
        latents = encode(images)
        if not checked:
            checked.append(True)
            require_space(folder, rows * latents[0].numel() * itemsize, "the latent cache")
        return latents

    return asking


class Readable(Dataset):
    """Images, or the fault of one that cannot be read, without a replacement.

    A fault of the disk is returned as well: a worker process would raise it in many lines.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, dict[str, Any] | UnreadableImage | DataError]:
        position, draw = item
        try:
            return position, self.dataset.read(position, draw)
        except (UnreadableImage, DataError) as error:
            return position, error


def write_latents(
    folder: Path,
    dataset: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    key: Key,
    variants: int,
    batch_size: int,
    dtype: str,
    num_workers: int | None = 0,
    team: Team | None = None,
    on_batch: Watch = lambda done, total: None,
) -> CacheMeta:
    """Encode every image `variants` times (crop, background, caption) into shards by bucket.

    Flips are enumerated: every other variant is mirrored. A single variant is not.

    Process r of R encodes shards r, r+R, ...; where shards begin does not depend on R. Images that cannot be read are left
    out and named in the meta. The caller seals the cache.

    Args:
        encode: images (B,3,H,W) in [-1,1] -> latents (B,c,h,w).
        key: what determines the content; a reader compares it.
    """
    team, dataset = team or Team(), dataset.enumerating()
    prepare_cache(folder, key, team)
    members = {int(g): np.flatnonzero(dataset.groups == g) for g in np.unique(dataset.groups)}
    first = variants * len(next(iter(members.values()), ()))
    unit = begun_with(folder, batch_size, first, variants, team, flip=dataset.flip)
    plans = planned_shards({group: len(own) * variants for group, own in members.items()}, unit)
    if team.main:
        planned = {latent_name(group, number) for group, number, _ in plans}
        for stray in latent_shards(folder):
            if stray.name not in planned:
                stray.unlink()
    done, total = 0, len(dataset) * variants
    rows_left = sum(
        len(places) for group, number, places in plans if not (folder / latent_name(group, number)).is_file()
    )
    encode = _asking_for_space(encode, folder, rows_left, np.dtype(dtype).itemsize) if team.main else encode
    lost: dict[str, str] = {}  # by this process, to stop before the rest is encoded in vain
    for turn, (group, number, places) in enumerate(plans):
        path = folder / latent_name(group, number)
        if turn % team.ranks == team.rank and not is_finished(path):
            turns = (divmod(place, len(members[group])) for place in places)
            items = [(int(members[group][i]), int(members[group][i]) + v * len(dataset)) for v, i in turns]
            settings = (batch_size, dtype, num_workers)
            shard = _write_shard(folder, number, group, items, dataset, encode, *settings, lost, key)
            for step in shard:
                on_batch(done + step, total)
                check_many(lost, min(done + step, len(dataset)) // team.ranks, 4 * ALWAYS)
        done += len(places)
        on_batch(done, total)
    team.wait()
    if team.main:
        merge_index(folder)
    team.wait()
    meta = merged_meta(folder, key, dataset)
    check_many(meta.skipped, len(dataset))
    return meta


def _write_shard(
    folder: Path,
    number: int,
    group: int,
    items: list[tuple[int, int]],
    dataset: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    dtype: str,
    num_workers: int | None,
    lost: dict[str, str],
    key: Key,
) -> Iterator[int]:
    """Encode one shard, yield the number of items done, and add unusable images to `lost`."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=chosen_workers(num_workers),
        collate_fn=lambda found: found,
    )
    parts: list[np.ndarray] = []
    captions: list[str] = []
    labels: list[int | None] = []
    images: list[int] = []
    skipped: dict[str, str] = {}
    statistics: ChannelStatistics | None = None
    over = 0
    for found in loader:
        for position, item in found:
            if isinstance(item, UnreadableImage):
                name = dataset.skip(position, item)
                skipped[name] = str(item)
                lost |= {name: str(item)} if item.kind in GONE else {}
            elif isinstance(item, DataError):
                raise item
        good = [(position, item) for position, item in found if isinstance(item, dict)]
        over += len(found)
        if good:
            encoded = encode(collate([item for _, item in good])["images"]).float().cpu()
            values, faults = stored(encoded.numpy(), dtype)
            for (position, _), fault in zip(good, faults, strict=True):
                if fault is not None:
                    name = dataset.skip(position, UnreadableImage(LATENT, fault))
                    lost[name] = skipped[name] = f"{LATENT}: {fault}"
            kept = [row for row, fault in enumerate(faults) if fault is None]
            statistics = statistics or ChannelStatistics(encoded.shape[1])
            if kept:
                statistics.update(encoded[kept])
                parts.append(values[kept])
            batch = [good[row][1] for row in kept]
            captions += [item["caption"] for item in batch]
            labels += [item["label"] for item in batch]
            images += [item["index"] for item in batch]
        yield over
    latents = np.concatenate(parts) if parts else np.zeros((0,), dtype)
    save_latents(
        folder, number, group, latents, captions, labels, statistics or ChannelStatistics(0), skipped, images, key
    )


class _Captions:
    """Packed captions of the shards, iterated any number of times, one shard in memory."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in self.paths:
            shard = CacheShard(path)
            yield shard.tensor("texts"), shard.tensor("ends")


def merge_index(folder: Path) -> None:
    """Write captions and classes of all shards as arrays that can be mapped."""
    paths = latent_shards(folder)
    write_table(folder, _Captions(paths))
    labels = [CacheShard(path).tensor("labels") for path in paths]
    save_array(folder / LABELS, np.concatenate(labels) if labels else np.empty(0, np.int64))


def merged_meta(
    folder: Path, key: Key, dataset: ImageDataset | None = None, given: tuple[Tensor, Tensor] | None = None
) -> CacheMeta:
    """Return the meta data of all shards, merged in their order.

    Args:
        given: (mean, std), each (c,), to take instead of the measured ones.

    Raises:
        DataError: not one image was readable, or a process wrote a shard of other data.
    """
    shards: list[tuple[str, int, int]] = []
    skipped: dict[str, str] = {}
    statistics: ChannelStatistics | None = None
    for path in latent_shards(folder):
        if not made_from(path, key):
            raise DataError(
                f"cache: {path} was written from other data by another process of this launch; give all processes the same "
                "files and run the same command again: this shard is then made again"
            )
        shard = CacheShard(path)
        skipped |= load_json(shard.metadata.get("skipped", "{}"))
        rows, mean = len(shard.tensor("labels")), torch.from_numpy(shard.tensor("mean"))
        if not rows:
            continue
        shards.append((path.name, rows, int(path.name.split("-")[1])))
        statistics = statistics or ChannelStatistics(len(mean))
        statistics.merge(int(shard.tensor("count").item()), mean, torch.from_numpy(shard.tensor("squares")))
    if dataset is not None:
        dataset.skipped.update(skipped)
    if statistics is None:
        raise DataError(f"none of the {len(skipped)} images can be read; the log names each")
    mean, std = given or (statistics.mean, statistics.std)
    items = sum(rows for _, rows, _ in shards)
    return CacheMeta(plain_key(key), items, mean.tolist(), std.tolist(), shards, skipped=skipped)


# -- text ------------------------------------------------------------------------------------------------------------


def write_text(
    folder: Path,
    encode: Callable[[list[str]], tuple[Tensor, ...]],
    meta: CacheMeta,
    *,
    batch_size: int,
    dtype: str,
    team: Team | None = None,
    on_batch: Watch = lambda done, total: None,
    name_of: Callable[[int], str] = str,
) -> CacheMeta:
    """Embed each distinct caption and the empty one once, into shards with a tensor per output.

    Items whose caption has no finite embedding are left out and named in the meta.

    Args:
        name_of: the number of an image -> its name.

    Raises:
        DataError: the empty caption has no finite embedding, or many others have none.
    """
    team = team or Team()
    table = CaptionTable(folder)
    row_bytes = sum(part.numel() * np.dtype(dtype).itemsize for part in encode([""]))
    rows = max(1, min(TEXT_BYTES // row_bytes, max(16, -(-table.count // 64))))
    if team.main:
        written = sum(path.stat().st_size for path in folder.glob("text-*.safetensors"))
        require_space(folder, table.count * row_bytes - written, "the cache of text embeddings")
    shards: list[tuple[str, int]] = []
    for number, start in enumerate(range(0, table.count, rows)):
        stop = min(start + rows, table.count)
        path = folder / f"text-{number:05d}.safetensors"
        shards.append((path.name, stop - start))
        made_of = captions_hash(table.digests[start:stop])
        if number % team.ranks == team.rank and not is_finished_text(path, made_of):
            captions = [table.distinct(row) for row in range(start, stop)]
            batches = [encode(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)]
            whole = [
                np.concatenate([part.float().cpu().numpy() for part in parts]) for parts in zip(*batches, strict=True)
            ]
            tensors, bad = packed(whole, dtype)
            save_shard(path, {**tensors, CAPTIONS: made_of}, {NOT_FINITE: json.dumps(sorted(bad))})
        on_batch(stop, table.count)
    team.wait()
    unusable, lost = lost_captions(folder, shards, table, name_of)
    items, skipped = meta.items - len(unusable), meta.skipped | lost
    return replace(meta, text=shards, items=items, unusable=unusable, skipped=skipped)
