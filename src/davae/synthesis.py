"""A training set drawn by a base model itself, as the paper's (Sec. 4): prompts in, WebDataset shards out."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from PIL import Image

from davae.data.files import index_tar
from davae.data.prompts import read_prompts
from davae.data.remote import add_member
from davae.files import atomic_file, saving
from davae.models.pipeline import default_resolution
from davae.models.placement import Placement
from davae.prompting import open_text_model, settings_of, stretches
from davae.sample.generate import generate

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
        DataError: no prompts. ModelError: a class-conditional model, or a folder with pictures of other settings.
    """
    texts = [prompt.text for prompt in read_prompts(prompts)]
    total = num or len(texts)
    state = PartialState()
    settings = {
        "model": model,
        "prompts": str(prompts),
        "num": total,
        "resolution": resolution,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "shard_size": shard_size,
        "format": picture_format,
        "dtype": placement.precision,
    }
    if state.is_main_process:
        settings_of(out, settings)
    state.wait_for_everyone()
    starts = range(0, total, shard_size)
    targets = [out / f"{number:05d}.tar" for number in range(len(starts))]
    own = [n for n in range(len(starts)) if n % state.num_processes == state.process_index]
    done = sum(min(shard_size, total - starts[n]) for n in own if targets[n].is_file())
    whole = sum(min(shard_size, total - starts[n]) for n in own)
    pipeline: Any = None
    for number in own:
        if targets[number].is_file():
            continue
        pipeline = pipeline or open_text_model(model, placement)
        size = resolution or default_resolution(pipeline)
        numbers = range(starts[number], min(starts[number] + shard_size, total))
        loose = out / f".{number:05d}"
        with saving(out):
            loose.mkdir(parents=True, exist_ok=True)
        missing = [i for i in numbers if not (loose / f"{i:08d}.{picture_format}").is_file()]
        done += len(numbers) - len(missing)
        on_picture(done, whole)
        for start, stop in stretches(missing, batch_size):
            wanted = [texts[i % len(texts)] for i in range(start, stop)]
            options = {"steps": steps, "guidance_scale": guidance, "seed": seed, "first": start}
            drawn = generate(pipeline, wanted, resolution=size, batch_size=batch_size, **options)
            for i, picture in enumerate(drawn, start):
                save_picture(loose / f"{i:08d}.{picture_format}", picture)
            done += stop - start
            on_picture(done, whole)
        about = {**settings, "resolution": size, "prompts": prompts.name}
        pack_shard(targets[number], loose, [(i, texts[i % len(texts)]) for i in numbers], about)
    return sum(not target.is_file() for target in targets)


def save_picture(path: Path, picture: Image.Image) -> None:
    """A picture that appears whole, in the format of its suffix."""
    with atomic_file(path) as partial:
        picture.save(partial, **SAVING[path.suffix.removeprefix(".")])


def pack_shard(target: Path, loose: Path, pictures: list[tuple[int, str]], about: dict[str, Any]) -> None:
    """Loose pictures into one shard of picture, `.txt` and `.json` (prompt, picture number, settings); then remove them."""
    with atomic_file(target) as partial:
        with tarfile.open(partial, "w") as archive:
            for number, prompt in pictures:
                name = f"{number:08d}.{about['format']}"
                add_member(archive, name, (loose / name).read_bytes())
                add_member(archive, f"{number:08d}.txt", prompt.encode())
                record = {"prompt": prompt, "number": number, **about}
                add_member(archive, f"{number:08d}.json", json.dumps(record, ensure_ascii=False).encode())
        index_tar(partial)
    shutil.rmtree(loose)  # only now: the shard is on the disk
