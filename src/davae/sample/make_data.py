"""Training set that a base model draws itself (Sec. 4), as WebDataset shards."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from PIL import Image

from davae.data.latent_cache.key import hash_values
from davae.data.prompts import read_prompts
from davae.data.shards.remote import add_member
from davae.data.shards.tar_index import index_tar
from davae.errors import ModelError
from davae.files.atomic import atomic_file
from davae.files.outputs import is_drawn
from davae.pretrained.shapes import default_resolution
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, model_places, open_text_model
from davae.sample.resume import kept_images, stretches

ImageFormat = Literal["png", "jpg"]
SAVING: dict[str, Any] = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}}


def draw_training_set(
    model: str,
    prompts: Path,
    out: Path,
    options: SamplingOptions,
    *,
    num: int | None,
    shard_size: int,
    image_format: ImageFormat,
    on_image: Callable[[int, int], None],
) -> int:
    """Draw images of prompts into the shards `out/00000.tar`, `out/00001.tar`, ...

    Prompts repeat until `num` images are drawn. Image i depends on the settings and i alone. Process r of R draws shards
    r, r+R, ... A shard appears whole, and the images of an interrupted one are kept, so that running the command again
    draws only what is missing.

    Args:
        model, prompts, out: the base by the names that `open_model` takes, file of prompts, folder of the shards.
        options: how the images are drawn.
        num, shard_size: images, one a prompt where None is given, and images a shard.
        image_format: `png`, or `jpg` at quality 95.
        on_image: called with the images that are done and their number.

    Returns:
        The number of shards that are still missing, because other processes draw them.

    Raises:
        DataError: no prompts.
        ModelError: a class-conditional model, an image that is not finite, or a folder with images of other settings,
            prompts or weights.
        RunError: a folder that holds something else, or that another process draws into.
    """
    texts = [prompt.text for prompt in read_prompts(prompts)]
    total = num or len(texts)
    state = PartialState()
    settings = {
        "num": total, "resolution": options.resolution, "steps": options.steps, "guidance": options.guidance,
        "seed": options.seed, "shard_size": shard_size, "format": image_format, "dtype": options.placement.precision,
    }  # fmt: skip
    shards = plan_shards(out, texts, total, shard_size, image_format)
    keep = kept_images(
        out,
        {**settings, "prompts": hash_values(texts), "weights": model_fingerprint(model_places(model))},
        {"model": model, "prompt_file": str(prompts)},
        former={"model": model, "prompts": str(prompts), **settings},
        check_former=lambda: check_former(shards),
    )
    with keep if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        own = shards[state.process_index :: state.num_processes]
        draw_shards(own, model, options, {"model": model, **settings, "prompts": prompts.name}, on_image)
    return sum(not is_drawn(shard.target) for shard in shards)


def draw_shards(
    shards: Sequence[ImageShard],
    model: str,
    options: SamplingOptions,
    about: dict[str, Any],
    on_image: Callable[[int, int], None],
) -> None:
    """Draw the images that shards lack, and pack each shard once it has all of them.

    Args:
        shards, options: the shards of this process, and how the images are drawn.
        model: the base, by the names that `open_model` takes.
        about: values of each image's record besides its prompt, its number and the size.
        on_image: called with the images that are done and their number.
    """
    missing = {shard.target: shard.missing() for shard in shards if not is_drawn(shard.target)}
    whole, left = sum(len(shard.texts) for shard in shards), sum(map(len, missing.values()))
    pipeline = open_text_model(model, options.placement) if missing else None
    size = options.resolution or (default_resolution(pipeline) if missing else 0)
    sized = replace(options, resolution=size)
    for shard in shards:
        if shard.target not in missing:
            continue
        on_image(whole - left, whole)
        for start, stop in stretches(missing[shard.target], options.batch_size):
            prompts = [shard.texts[i] for i in range(start, stop)]
            for i, image in enumerate(generate(pipeline, prompts, sized, first=start), start):
                save_drawn(shard.loose(i), image)
            left -= stop - start
            on_image(whole - left, whole)
        shard.pack({**about, "resolution": size})


@dataclass(frozen=True)
class ImageShard:
    """One shard of a drawn set, whole in `target` or in loose images.

    Attributes:
        target: the `.tar` file.
        texts: number of an image -> its prompt.
        format: suffix of the images.
    """

    target: Path
    texts: dict[int, str]
    format: str

    @property
    def folder(self) -> Path:
        """Return the folder of the images while the shard is not whole."""
        return self.target.with_name(f".{self.target.stem}")

    def loose(self, number: int) -> Path:
        """Return the file of one image while the shard is not whole."""
        return self.folder / f"{number:08d}.{self.format}"

    def missing(self) -> list[int]:
        """Return the numbers of the images that are not drawn yet."""
        return [number for number in self.texts if not is_drawn(self.loose(number))]

    def pack(self, about: dict[str, Any]) -> None:
        """Move the loose images into the shard, each with its prompt and a `.json` record."""
        with atomic_file(self.target) as partial:
            with tarfile.open(partial, "w") as archive:
                for number, prompt in self.texts.items():
                    add_member(archive, self.loose(number).name, self.loose(number).read_bytes())
                    add_member(archive, f"{number:08d}.txt", prompt.encode())
                    record = {"prompt": prompt, "number": number, **about}
                    add_member(archive, f"{number:08d}.json", json.dumps(record, ensure_ascii=False).encode())
            index_tar(partial)
        shutil.rmtree(self.folder)  # only now: the shard is on the disk

    def packed_texts(self) -> dict[int, str]:
        """Return the prompts in the whole shard, by number."""
        with tarfile.open(self.target) as archive:
            members = [member for member in archive if member.name.endswith(".txt")]
            return {int(m.name[:-4]): archive.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]


def plan_shards(out: Path, texts: list[str], total: int, size: int, image_format: str) -> list[ImageShard]:
    """Return the shards of a drawn set, with prompts that repeat in order.

    Args:
        out, texts, total: folder of the shards, prompts, images of the set.
        size, image_format: images a shard, and their suffix.
    """
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [
        ImageShard(out / f"{number:05d}.tar", {i: texts[i % len(texts)] for i in part}, image_format)
        for number, part in enumerate(parts)
    ]


def check_former(shards: list[ImageShard]) -> None:
    """Check the prompts of shards of former versions, and remove their loose images.

    Raises:
        ModelError: a shard with other prompts.
    """
    for shard in shards:
        if is_drawn(shard.target) and shard.packed_texts() != shard.texts:
            raise ModelError(f"{shard.target} holds images of other prompts; use another --out")
        shutil.rmtree(shard.folder, ignore_errors=True)


def save_drawn(path: Path, image: Image.Image) -> None:
    """Write an image that appears whole, in the format of its suffix."""
    with atomic_file(path) as partial:
        image.save(partial, **SAVING[path.suffix.removeprefix(".")])
