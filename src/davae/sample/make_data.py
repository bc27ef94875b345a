"""A training set drawn by a base model itself, as the paper's (Sec. 4): prompts in, WebDataset shards out."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from davae.pretrained.open import default_resolution
from davae.pretrained.placement import Placement
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import model_places, open_text_model
from davae.sample.resume import Drawing, kept_images, stretches

PictureFormat = Literal["png", "jpg"]
SAVING: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def make_data(
    model: str,
    prompts: Path,
    out: Path,
    *,
    num: int | None,
    resolution: int | None,
    steps: int,
    guidance: float,
    seed: int,
    shard_size: int,
    picture_format: PictureFormat,
    placement: Placement,
    batch_size: int,
    on_picture: Callable[[int, int], None],
) -> int:
    """Draw `num` pictures, prompt after prompt and round again, into `out/00000.tar`, `out/00001.tar`, ...

    Picture i hangs on the settings and i alone. Process r of R makes shards r, r+R, ...; a shard appears whole, and the
    pictures of one that was interrupted are kept, so running the same command again draws only what is missing.

    Returns:
        How many shards are still missing: other processes draw them.

    Raises:
        DataError: no prompts.
        ModelError: a class-conditional model, a picture that is not finite, or a folder with pictures of other settings,
            prompts or weights.
        RunError: a folder that holds something else, or that another process draws into.
    """
    texts = [prompt.text for prompt in read_prompts(prompts)]
    total = num or len(texts)
    state = PartialState()
    settings = {
        "num": total,
        "resolution": resolution,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "shard_size": shard_size,
        "format": picture_format,
        "dtype": placement.precision,
    }
    weights = model_fingerprint(model_places(model))
    shards = plan_shards(out, texts, total, shard_size, picture_format)
    keep = kept_images(
        out,
        {**settings, "prompts": hash_values(texts), "weights": weights},
        {"model": model, "prompt_file": str(prompts)},
        former={"model": model, "prompts": str(prompts), **settings},
        check_former=lambda: check_former(shards),
    )
    with keep if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        how = Drawing(steps, guidance, seed, resolution, batch_size, placement)
        own = shards[state.process_index :: state.num_processes]
        draw_shards(own, model, how, {"model": model, **settings, "prompts": prompts.name}, on_picture)
    return sum(not is_drawn(shard.target) for shard in shards)


def draw_shards(
    shards: Sequence[Shard], model: str, how: Drawing, about: dict[str, Any], on_picture: Callable[[int, int], None]
) -> None:
    """Draw what is missing of shards; each appears whole, and its pictures stay loose until then.

    Args:
        about: what each picture's record has besides its prompt, its number and the size.
    """
    missing = {shard.target: shard.missing() for shard in shards if not is_drawn(shard.target)}
    whole, left = sum(len(shard.texts) for shard in shards), sum(map(len, missing.values()))
    pipeline = open_text_model(model, how.placement) if missing else None
    size = how.resolution or (default_resolution(pipeline) if missing else 0)
    options = {"steps": how.steps, "guidance_scale": how.guidance, "seed": how.seed, "resolution": size}
    for shard in shards:
        if shard.target not in missing:
            continue
        on_picture(whole - left, whole)
        for start, stop in stretches(missing[shard.target], how.batch_size):
            wanted = [shard.texts[i] for i in range(start, stop)]
            drawn = generate(pipeline, wanted, first=start, batch_size=how.batch_size, **options)
            for i, picture in enumerate(drawn, start):
                save_picture(shard.loose(i), picture)
            left -= stop - start
            on_picture(whole - left, whole)
        shard.pack({**about, "resolution": size})


@dataclass(frozen=True)
class Shard:
    """One shard of a drawn set, whole in `target` or in loose pictures.

    Attributes:
        texts: the prompt of each of its pictures, by the picture's number.
    """

    target: Path
    texts: dict[int, str]
    format: str

    @property
    def folder(self) -> Path:
        """Where its pictures lie until it is whole."""
        return self.target.with_name(f".{self.target.stem}")

    def loose(self, number: int) -> Path:
        """Where one picture lies until the shard is whole."""
        return self.folder / f"{number:08d}.{self.format}"

    def missing(self) -> list[int]:
        """Return the numbers of the pictures that are not drawn yet."""
        return [number for number in self.texts if not is_drawn(self.loose(number))]

    def pack(self, about: dict[str, Any]) -> None:
        """Put the loose pictures into the shard, with `.txt` and `.json` (prompt, number, settings), and remove them."""
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


def plan_shards(out: Path, texts: list[str], total: int, size: int, picture_format: str) -> list[Shard]:
    """Return the shards of `total` pictures, prompt after prompt and round again."""
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [
        Shard(out / f"{number:05d}.tar", {i: texts[i % len(texts)] for i in part}, picture_format)
        for number, part in enumerate(parts)
    ]


def check_former(shards: list[Shard]) -> None:
    """Check shards of a davae that kept the prompt file's name alone; its loose pictures are drawn again.

    Raises:
        ModelError: a shard with other prompts.
    """
    for shard in shards:
        if is_drawn(shard.target) and shard.packed_texts() != shard.texts:
            raise ModelError(f"{shard.target} holds pictures of other prompts; use another --out")
        shutil.rmtree(shard.folder, ignore_errors=True)


def save_picture(path: Path, picture: Image.Image) -> None:
    """A picture that appears whole, in the format of its suffix."""
    with atomic_file(path) as partial:
        picture.save(partial, **SAVING[path.suffix.removeprefix(".")])
