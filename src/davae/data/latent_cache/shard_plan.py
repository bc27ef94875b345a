"""Plan of a latent cache's shards, the same for every process and after a resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from davae.data.latent_cache.meta import Team, replace_json
from davae.data.latent_cache.shard_files import REMEDY, CacheShard
from davae.errors import DataError
from davae.files.reading import load_json, whole_number

logger = logging.getLogger(__name__)

FILE = "shards.json"  # the batch size that a cache was begun with, and its rule of flips
FLIPS = "enumerated"  # every other variant is mirrored; earlier versions drew the flip of each
SHARD_ROWS = 1024  # at most: 256 MiB of SD3.5's latents at 1K, what an interruption can cost


def shard_rows(total: int, batch_size: int) -> int:
    """Return the rows of a shard: whole batches, 16 to SHARD_ROWS, for about 64 shards."""
    rows = min(SHARD_ROWS, max(16, -(-total // 64)))
    return -(-rows // batch_size) * batch_size


def planned_shards(items: Mapping[int, int], batch_size: int) -> list[tuple[int, int, range]]:
    """Cut the items of each bucket into shards.

    Args:
        items: bucket -> its items, variants counted.
        batch_size: the batch size that shards are cut by.

    Returns:
        (bucket, number, which of the bucket's items) of each shard, in order.
    """
    plans = []
    for group, total in items.items():
        rows = shard_rows(total, batch_size)
        starts = enumerate(range(0, total, rows))
        plans += [(group, number, range(start, min(start + rows, total))) for number, start in starts]
    return plans


def begun_with(folder: Path, batch_size: int, first: int, variants: int, team: Team, *, flip: bool = False) -> int:
    """Return the batch size that a cache's shards are cut by, which a resumed cache keeps.

    An interrupted cache of an earlier davae does not hold it. Its shards are made again where they cannot have been cut
    by `batch_size`, or where they are mirrored by another rule: one cache holds one rule.

    Args:
        first: items of the first bucket, variants counted.
        variants: of each image.
        flip: whether images are mirrored.

    Raises:
        DataError: the file that holds it is damaged.
    """
    path = folder / FILE
    if team.main and flip:
        _same_flips(folder, path)
    if team.main and not path.is_file():
        shards = sorted(folder.glob("latents-*.safetensors"))
        if shards and not _cut_by(shards[0], min(first, shard_rows(first, batch_size)), variants):
            logger.warning(
                "cache %s is made again: cache.batch_size changed, and its shards do not hold the old one", folder
            )
            for shard in shards:
                shard.unlink()
        replace_json(path, {"batch_size": batch_size, "flips": FLIPS})
    team.wait()
    try:
        return whole_number(load_json(path.read_text(encoding="utf-8"))["batch_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"cache file {path} is damaged; {REMEDY}") from error


def _same_flips(folder: Path, path: Path) -> None:
    """Remove the shards of an earlier version, which drew the flip of each image."""
    try:
        known = load_json(path.read_text(encoding="utf-8")).get("flips") if path.is_file() else None
    except (ValueError, AttributeError):
        return  # damaged, which is an error in `begun_with`
    shards = sorted(folder.glob("latents-*.safetensors"))
    if known == FLIPS or not shards:
        return
    logger.warning("cache %s is made again: an earlier version began it and mirrors images by another rule", folder)
    for shard in shards:
        shard.unlink()
    path.unlink(missing_ok=True)


def _cut_by(path: Path, rows: int, variants: int) -> bool:
    """Return whether a shard can have a number of rows, with those of skipped images."""
    shard = CacheShard(path)
    found = len(shard.tensor("labels"))
    return found <= rows <= found + variants * len(load_json(shard.metadata.get("skipped", "{}")))
