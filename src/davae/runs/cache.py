"""Cache step of upgrades and base trainings: its key and content, and unusable images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from davae.data.images import ImageDataset, by_kind, summarise_skipped
from davae.data.latent_cache.import_shards import PATTERN, STATISTICS, import_shards, open_shards
from davae.data.latent_cache.key import (
    FORMER_DATA,
    Key,
    changes,
    hash_former,
    hash_images,
    hash_shards,
    hash_values,
    hash_weights,
    plain_key,
)
from davae.data.latent_cache.meta import CacheMeta, Team, seal
from davae.data.latent_cache.write import Watch, write_latents, write_text
from davae.data.tables import TableSource
from davae.dataset.encoding import Encoder
from davae.dataset.opened import OpenedData
from davae.errors import DataError
from davae.files.atomic import atomic_text, saving
from davae.recipes.sections import Cache, Data
from davae.train.distributed import differing_values, patient_barrier
from davae.train.loop import Observer, Progress
from davae.train.signals import check_stop

logger = logging.getLogger(__name__)

# options of `data` that change an item, given its image
PREPARED_BY = {
    *("flip", "crop", "buckets", "background", "max_pixels"),
    *("caption_key", "caption_weights", "caption_column", "label_key", "label_column", "image_column"),
}
LATER = {"enlarge"}  # options that caches of earlier versions do not list: no part of a key while they are off
# entries of the autoencoder's config that change no raw latent
NO_PART = {
    *("resolution", "detail_mean", "detail_std", "detail_kernel_size"),
    *("latents_mean", "latents_std", "scaling_factor", "shift_factor"),
}
KERNEL = "detail_kernel"  # weights that normalise latents
PREVIEW = "base_decoder"  # part of an autoencoder that encodes nothing; earlier versions had none


def team(accelerator: Accelerator) -> Team:
    """Return the processes of this run as writers of a cache."""
    return Team(accelerator.process_index, accelerator.num_processes, patient_barrier)


def check_same_key(key: Key) -> None:
    """Compare the keys of all processes before a shard is written. Collective.

    Raises:
        DataError: another process would write other content: images or weights changed since the launch.
    """
    if differing := differing_values(plain_key(key)):
        (_, _, first), (other, host, value) = differing[:2]
        raise DataError(
            f"cache: process {other} on {host} would write another cache than process 0, as these differ: "
            f"{' and '.join(changes(first, value))}; give all processes the same files, then run the same command again"
        )


def cache_key(
    vae: nn.Module, opened: OpenedData, data: Data, cache: Cache, *, resolution: int, seed: int, text: Any = None
) -> Key:
    """Return everything on which a cache's content depends.

    Cached latents are raw, so the autoencoder's normalisation and the size that its pipeline draws are left out.

    Args:
        vae: the autoencoder.
        opened: the images.
        data, cache: sections of the recipe.
        resolution: of the images, pixels.
        seed: of the run.
        text: plain values that identify the text encoders; None where nothing is embedded.
    """
    config: dict[str, Any] = dict(vae.config)  # type: ignore[arg-type]
    fixed = {name: v for name, v in config.items() if name not in NO_PART and not name.startswith(("_", PREVIEW))}
    encoding = vae.state_dict().items()
    weights = [(name, tensor) for name, tensor in encoding if name != KERNEL and not name.startswith(f"{PREVIEW}.")]
    key: dict[str, Any] = {"autoencoder": hash_weights(weights, fixed)}
    if cache.shards is not None:
        files = sorted([*Path(cache.shards).glob(PATTERN), *Path(cache.shards).glob(STATISTICS)])
        key["data"] = hash_shards(files)
        key[FORMER_DATA] = hash_values([(file.name, file.stat().st_size) for file in files])
        key["preprocessing"] = {"cache.dtype": cache.dtype}
    else:
        key["data"] = hash_images(opened.source, opened.train)
        if isinstance(opened.source, TableSource):
            key[FORMER_DATA] = hash_former(opened.source, opened.train)
        key["preprocessing"] = {
            **{f"data.{name}": v for name, v in data.model_dump(mode="json", include=PREPARED_BY).items()},
            **{f"cache.{name}": v for name, v in cache.model_dump(include={"variants", "dtype"}).items()},
            **{f"data.{name}": True for name in sorted(LATER) if getattr(data, name)},
            "resolution": resolution,
            "seed": seed,
        }
    if text is not None:
        key["text"] = hash_values(text)
    return key


def show_cache(observer: Observer, prefix: str = "") -> Callable[[str], Watch]:
    """Return part of the cache -> a callback that shows its progress and stops after a signal.

    Args:
        observer: called after every batch.
        prefix: of the part's name on the display.
    """

    def show(name: str) -> Watch:
        def watch(done: int, total: int) -> None:
            observer(Progress(f"{prefix}{name}", done, total, 0.0))
            check_stop(f"the cache's {name}")

        return watch

    return show


def cache_images(
    folder: Path,
    images: ImageDataset,
    vae: Any,
    *,
    key: Key,
    cache: Cache,
    precision: torch.dtype,
    smaller: int = 1,
    num_workers: int | None,
    accelerator: Accelerator,
    watch: Callable[[str], Watch],
    embed: Callable[[list[str]], tuple[Tensor, ...]] | None = None,
) -> CacheMeta:
    """Write a whole cache: latents of all images, and embeddings of their captions.

    Args:
        folder: of the cache.
        images: the training set.
        vae: an autoencoder in float32, on its device.
        key: everything on which the content depends.
        cache: section of the recipe.
        precision: in which the autoencoder encodes.
        smaller: factor by which images are downsampled before.
        num_workers: of the data loader.
        accelerator: of the run.
        watch: see `show_cache`.
        embed: captions -> text embeddings, one tensor per kind.
    """
    together = team(accelerator)
    if images.flip and cache.variants == 1:
        logger.warning(
            "data.flip: the cache holds one variant of every image, not mirrored; set cache.variants to 2 for both"
        )

    options: dict[str, Any] = {"batch_size": cache.batch_size, "dtype": cache.dtype, "team": together}
    with saving(folder):
        meta = write_latents(
            folder,
            images,
            Encoder(vae, precision, cache.batch_size, smaller=smaller),
            key=key,
            variants=cache.variants,
            num_workers=num_workers,
            on_batch=watch("latents"),
            **options,
        )
        if embed is not None:
            meta = write_text(folder, embed, meta, on_batch=watch("captions"), name_of=images.source.key, **options)
            images.skipped.update(meta.skipped)
        return seal(folder, meta, together)


def check_shards(cache: Cache, channels: int, side: int, num_classes: int | None) -> None:
    """Check latent shards by their headers and classes, before anything is trained.

    Args:
        cache: section of the recipe, with `shards`.
        channels, side, num_classes: of the model; its latents are (channels, side, side).

    Raises:
        DataError: the model is not class-conditional, or there are no shards of its latents.
    """
    open_shards(Path(str(cache.shards)), channels, _classes_of_shards(num_classes), side)


def _classes_of_shards(num_classes: int | None) -> int:
    if num_classes is None:
        raise DataError("cache.shards: latent shards hold class labels; they train class-conditional models")
    return num_classes


def cache_shards(
    folder: Path,
    cache: Cache,
    *,
    channels: int,
    num_classes: int | None,
    key: Key,
    accelerator: Accelerator,
    watch: Callable[[str], Watch],
) -> None:
    """Copy, in one process, latents of LightningDiT's extraction instead of encoding images.

    Args:
        folder: of the cache.
        cache: section of the recipe, with `shards`.
        channels: of the latents.
        num_classes: of the model; None where it is not class-conditional.
        key: everything on which the content depends.
        accelerator: of the run.
        watch: see `show_cache`.

    Raises:
        DataError: as `check_shards`.
    """
    assert cache.shards is not None
    classes = _classes_of_shards(num_classes)
    check_same_key(key)
    if accelerator.is_main_process:
        with saving(folder):
            meta = import_shards(
                Path(cache.shards),
                folder,
                channels=channels,
                num_classes=classes,
                key=key,
                dtype=cache.dtype,
                on_batch=watch("latents"),
            )
            seal(folder, meta)
    patient_barrier()


def write_skipped(path: Path, used: int, skipped: dict[str, str], accelerator: Accelerator) -> None:
    """Write `pictures.json`: how many images train, and the others by the reason to skip them.

    Args:
        path: of the file.
        used: number of images that train.
        skipped: name -> reason.
        accelerator: of the run; its first process writes.
    """
    if not accelerator.is_main_process:
        return
    kinds = by_kind(skipped)
    summary = {"used": used, "left_out": {kind: len(names) for kind, names in kinds.items()}, "names": kinds}
    atomic_text(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if skipped:
        logger.warning("%d images train; %s; all names in %s", used, summarise_skipped(skipped), path)
