"""A look at a data source without a training: its summary and its images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from torch import Tensor

from davae.data.conditions import NEEDS_CLASSES
from davae.data.images import ImageDataset, grid, spread_indices, to_images
from davae.data.shards.names import expand_braces
from davae.data.shards.remote import glob_url, is_remote
from davae.data.sources import check_name
from davae.data.summary import CLIP_AT_LEAST, EXAMPLES, Summary, TokenLimit, example
from davae.dataset.opened import OpenedData, announce, architecture_limits, model_limits, open_images, open_pictures
from davae.errors import DataError, ModelError, RunError, UnreadableImage
from davae.files.atomic import atomic_file, make_folder
from davae.files.outputs import check_place, refuse
from davae.files.reading import read_object
from davae.pretrained.offline import readable
from davae.recipes import AnyRecipe, BaseRecipe, Recipe
from davae.recipes.base import TextArchitecture
from davae.recipes.sections import Data
from davae.tasks.base_model import BaseModel, planned_shapes, with_known_base
from davae.zoo import resolve

logger = logging.getLogger(__name__)

GLIMPSE = 100  # rows of a remote table that a look copies
SHEET = "contact-sheet.png"
CELL = 160  # pixels of an image on the contact sheet
SUMMARY_KEYS = {"layout", "images_found", "captions_from"}  # by which a summary is known


def glimpse(data: Data) -> tuple[Data, str]:
    """Return the part of a remote source that a look reads, and its description.

    Of shards at addresses the first one is copied, of a table on the hub the first rows.
    """
    name = data.source
    check_name(name)
    if is_remote(name) and not name.endswith(".parquet"):
        urls = [url for pattern in expand_braces(name) for url in glob_url(pattern)]
        if len(urls) > 1:
            return data.model_copy(update={"source": urls[0]}), f"the first of {len(urls):,} shards, {urls[0]}"
        return data, ""
    here = name in ("openmoji", "openmoji-all") or os.path.exists(name) or (not is_remote(name) and "*" in name)
    if here or data.streaming or Path(name).suffix in (".tar", ".npz") or name.startswith((".", "/", "~")):
        return data, ""
    limit = min(data.limit or GLIMPSE, GLIMPSE)
    return data.model_copy(update={"streaming": True, "limit": limit}), f"the first {limit:,} rows"


def look_at(
    data: Data,
    resolution: int | None = None,
    *,
    step: int | None = None,
    limits: list[TokenLimit] | None = None,
    show: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> Summary:
    """Summarise a source, and write images as training would see them and a contact sheet.

    Args:
        data: the source and its options.
        resolution: pixels of the square that trains; None takes images of every size as they are.
        step: pixels that a token spans, for `data.buckets`.
        limits: limits of a model's text encoders; CLIP's, counted by words, where no model is known.
        show: images to write; one that turns out damaged is left out and the next one takes its place.
        out: their folder.
        seed: seed of crop, flip and background.

    Returns:
        The summary; the `file` of each example is the image that was written.

    Raises:
        DataError: nothing there. RunError: a folder that holds something else or cannot be written.
    """
    part, partial = glimpse(data)
    opened = open_pictures(part, resolution, step, strict=False)
    shown: list[dict[str, Any]] = []
    if show is not None:
        assert out is not None
        opened, shown = write_shown(opened, show, out, seed)
    chosen = [CLIP_AT_LEAST] if limits is None else limits
    summary = opened.summary(chosen, examples=0 if shown else EXAMPLES, partial=partial)
    summary = replace(summary, source=data.source)
    return replace(summary, examples=shown) if shown else summary


def write_shown(opened: OpenedData, num: int, out: Path, seed: int) -> tuple[OpenedData, list[dict[str, Any]]]:
    """Write the first `num` sound images, and return the source without damaged ones."""
    empty_folder(out)
    damaged: dict[str, str] = {}
    bad: set[int] = set()
    shown: list[dict[str, Any]] = []
    cells: list[Image.Image] = []
    for place, image, caption in prepared(opened, seed, damaged, bad):
        index = opened.survey.indices[place]
        path = out / f"{len(shown):05d}.png"
        with atomic_file(path) as partial:
            image.save(partial, "PNG")
        entry = example(opened.source, index, opened.survey.pixels[place])
        shown.append({**entry, "caption": caption, "file": str(path), "shown": list(image.size)})
        cells.append(ImageOps.pad(image, (CELL, CELL), color="white"))
        if len(shown) == num:
            break
    if cells:
        with atomic_file(out / SHEET) as partial:
            grid(cells, min(8, len(cells))).save(partial, "PNG")
    kept = [place for place in range(len(opened.survey.indices)) if place not in bad]
    survey = replace(
        opened.survey,
        indices=[opened.survey.indices[place] for place in kept],
        groups=opened.survey.groups[kept],
        pixels=opened.survey.pixels[kept],
        left_out={**opened.survey.left_out, **damaged},
    )
    return replace(opened, survey=survey), shown


def prepared(
    opened: OpenedData, seed: int, damaged: dict[str, str], bad: set[int]
) -> Iterator[tuple[int, Image.Image, str]]:
    """Yield (place, image, caption) of all usable images, prepared as in the first epoch.

    Names of damaged images and their places are added to `damaged` and `bad`.
    """
    indices, data = opened.survey.indices, opened.data
    if not indices:
        return
    pictures = None
    if opened.sizes:
        options: dict[str, Any] = {"sizes": opened.sizes, "groups": opened.survey.groups, "enlarge": data.enlarge}
        square = opened.sizes[0][0]
        pictures = ImageDataset(opened.source, indices, square, seed=seed, flip=data.flip, crop=data.crop, **options)
    for place, index in enumerate(indices):
        try:
            if pictures is not None:
                item = pictures.read(place, place)
                yield place, to_images(item["image"][None])[0], item["caption"]
                continue
            opened.source.label(index)  # a damaged class leaves its image out
            rng = np.random.default_rng((seed, place))
            image, caption = opened.source.load(index, rng)
            mirrored = data.flip and rng.random() < 0.5
            yield place, ImageOps.mirror(image) if mirrored else image, caption
        except UnreadableImage as error:
            damaged[opened.source.key(index)] = str(error)
            bad.add(place)


def empty_folder(out: Path) -> None:
    """Make the folder of shown images, without those of an earlier look.

    Raises:
        RunError: it holds other files.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: found a file; give a folder")
    found = list(out.iterdir()) if out.is_dir() else []
    ours = [path for path in found if path.name == SHEET or (path.stem.isdigit() and path.suffix == ".png")]
    if len(ours) < len(found) or (ours and not (out / SHEET).is_file()):
        other = next(path.name for path in found if path not in ours or not (out / SHEET).is_file())
        raise RunError(f"--out {out}: found other files ({other}); give an empty folder or a new one")
    for path in ours:
        path.unlink()
    make_folder(out)


def check_show(show: int | None, out: Path | None) -> None:
    """Refuse one of the two options without the other.

    Raises:
        DataError: names the missing one.
    """
    if show is not None and out is None:
        raise DataError("--show: the folder for the images is missing; give --out DIR")
    if out is not None and show is None:
        raise DataError("--out: the number of images to write is missing; give --show N")


def recipe_step(recipe: Recipe | BaseRecipe) -> int | None:
    """Return the pixels of a token in a recipe's model, None where it takes squares alone."""
    if isinstance(recipe, Recipe):
        known, _ = with_known_base(recipe)
        configs = None if known.base.model is None else readable(resolve(known.base.model))[0]
        return BaseModel.of(known, configs=configs).bucket_step(recipe.scale)
    if isinstance(recipe.architecture, TextArchitecture):
        return planned_shapes(recipe).vae_factor * recipe.architecture.patch_size
    return None


def model_of(model: str | None, recipe: AnyRecipe | None) -> list[TokenLimit] | None:
    """Return the limits of a model's or a recipe's text encoders, None where neither is known.

    A recipe's model that cannot be read is named in the log: its data can be looked at without it.

    Raises:
        ModelError: a model that was named cannot be read.
    """
    if model is None and isinstance(recipe, BaseRecipe):
        return architecture_limits(recipe)
    if model is None and isinstance(recipe, Recipe):
        recipe, _ = with_known_base(recipe)
        if recipe.base.train is not None:
            return architecture_limits(recipe.base.train)
        try:
            return model_of(recipe.base.model, None)
        except ModelError as error:
            logger.warning("captions are counted by their words, at least: %s", error)
    if model is None:
        return None
    base = BaseModel(readable(resolve(model))[0], to_train=False)
    return model_limits(base) if base.family.condition == "text" else []


def as_data(data: str | Data) -> Data:
    """Return a section `data`, whose source a text is."""
    return Data(source=data) if isinstance(data, str) else data


def data_figures(data: str | Data) -> dict[str, Any]:
    """Return the source of images and its options without defaults, as figures record them."""
    chosen = as_data(data)
    options = chosen.model_dump(mode="json", exclude_defaults=True, exclude={"source"})
    return {"data": chosen.source, **({"options": options} if options else {})}


def check_summary(path: Path) -> None:
    """Refuse a file that does not hold a summary of a source, before any work.

    Raises:
        RunError: in one line, what is there.
    """
    try:
        ours = not check_place(path) or read_object(path).keys() >= SUMMARY_KEYS
    except ModelError:
        ours = False
    if not ours:
        refuse(path, "a summary of images that davae wrote")


def real_pictures(
    data: str | Data,
    resolution: int,
    held_out: float,
    side: Literal["train", "held_out"],
    *,
    summary: Path | None = None,
    limits: Sequence[TokenLimit] = (CLIP_AT_LEAST,),
) -> ImageDataset:
    """Return the images of a source as squares: all, or one side of a split.

    Args:
        data: a source, or a whole section `data`; its buckets and augmentations are not used.
        resolution: pixels.
        held_out, side: share that is held out, and side of the split.
        summary: file for the summary, which is logged too.
        limits: limits of a model's text encoders.
    """
    chosen = as_data(data).model_copy(update={"holdout": held_out, "buckets": None})
    opened = open_images(chosen, resolution, side=side if held_out else "both")
    if not opened.survey.indices:
        raise DataError(f"{chosen.source}: no {side.replace('_', '-')} image at share {held_out}; take another share")
    announce(opened.summary(limits), summary)
    return opened.squares(opened.survey.indices)


def batches(
    pictures: ImageDataset, num: int | None = None, size: int = 16, *, shared: bool = False
) -> Iterator[Tensor]:
    """Yield plain images, (B,3,R,R), in order, as `numbered_batches` does."""
    return (images for _, images in numbered_batches(pictures, num, size, shared=shared))


def prompts_of(pictures: ImageDataset, positions: Sequence[int], by_class: bool) -> list[str]:
    """Return the prompts of images by position, without decoding: captions or classes.

    Raises:
        DataError: an image without a class.
    """
    source, indices = pictures.source, [pictures.indices[position] for position in positions]
    prompts = [source.label(index) if by_class else source.caption(index) for index in indices]
    if None in prompts:
        raise DataError(NEEDS_CLASSES)
    return [str(prompt) for prompt in prompts]


def numbered_batches(
    pictures: ImageDataset, num: int | None = None, size: int = 16, *, shared: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the positions of images and the images, (B,3,R,R), in order.

    An image that turns out unreadable is left out and logged: its neighbour would be measured twice. What belongs to an
    image, such as its class, is found by its position.

    Args:
        num: number of images, spread over all.
        shared: give each process its part.
    """
    indices = spread_indices(len(pictures), num)
    if shared:
        indices = indices[PartialState().process_index :: PartialState().num_processes]
    for start in range(0, len(indices), size):
        images, positions = [], []
        for i in indices[start : start + size]:
            try:
                images.append(pictures.read(i, -1)["image"])
                positions.append(int(i))
            except UnreadableImage as error:
                pictures.skip(i, error)
        if images:
            yield positions, torch.stack(images)


def images_and_prompts(
    pictures: ImageDataset, by_class: bool, num: int | None = None, size: int = 16
) -> tuple[Tensor, list[str]]:
    """Return images (N,3,R,R) of `numbered_batches` at once, and their prompts of `prompts_of`."""
    parts, prompts = [torch.empty(0, 3, pictures.resolution, pictures.resolution)], []
    for positions, images in numbered_batches(pictures, num, size):
        parts.append(images)
        prompts += prompts_of(pictures, positions, by_class)
    return torch.cat(parts), prompts
