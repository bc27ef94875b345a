"""What `davae sample` and `davae evaluate samples` do: images of a model into files that davae may write over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from PIL import Image
from torch import Tensor

from davae.backbones.classes import class_count, goes_by_class
from davae.backbones.expand import MARK
from davae.backbones.families.rows import denoiser, transformer_family
from davae.backbones.lora import widen_lora
from davae.data.images import grid
from davae.data.prompts import read_prompts
from davae.errors import ModelError
from davae.files.atomic import save_tensors, saving
from davae.files.outputs import check_image, check_place, save_image
from davae.pretrained.lora_files import read_lora
from davae.pretrained.placement import FULL, Placement
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import check_classes, model_places, open_model
from davae.sample.preview import Preview
from davae.sample.sample_file import Labels, class_schedule, write_samples


def sample_to_folder(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    *,
    num: int,
    seed: int,
    steps: int,
    guidance: float,
    resolution: int | tuple[int, int] | None,
    batch_size: int,
    on_batch: Callable[[int, int], None],
    negative_prompt: str | None = None,
    preview: Preview | None = None,
) -> Path:
    """Write `num` images of every prompt and one grid, a row a prompt; return the grid's path.

    Images of an earlier call are kept: where one of the names is taken, all get the next free `set2`, `set3`, ...

    Args:
        preview: its images are written next to the grid, as `previews-<grid>`, while they are drawn: a row an image.

    Raises:
        ModelError: a class that the model lacks, an image that is not finite; those before it are written.
        RunError: files of these names are there, and davae did not write them.
    """
    check_classes(pipeline, prompts)
    wanted = [prompt for prompt in prompts for _ in range(num)]
    *places, sheet = free_places(folder, wanted, seed)
    strip = Strip(sheet.with_name(f"previews-{sheet.name}"))
    if preview is not None:
        check_image(strip.path)
        preview.on_preview = strip.add
    pictures: list[Any] = []
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        strip.first = start
        options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "seed": seed, "batch_size": batch_size}
        options["preview"] = preview
        options |= {"resolution": resolution, "negative_prompt": negative_prompt}
        drawn = generate(pipeline, part, first=start, **options)
        for place, picture in zip(places[start:], drawn, strict=False):
            save_image(picture, place)
        pictures += drawn
        on_batch(len(pictures), len(wanted))
    save_image(grid(pictures, num), sheet)
    return sheet


class Strip:
    """A sheet of previews: a row an image, a column a step; written again with every preview.

    Attributes:
        first: row of the first image of the batch that is drawn.
    """

    def __init__(self, path: Path):
        self.path, self.first = path, 0
        self._rows: dict[int, dict[int, Any]] = {}

    def add(self, step: int, images: list[Any]) -> None:
        """Put the images of a step into their rows."""
        for row, image in enumerate(images, self.first):
            self._rows.setdefault(row, {})[step] = image
        steps = sorted({step for row in self._rows.values() for step in row})
        blank = Image.new("RGB", images[0].size, "white")
        cells = [row.get(step, blank) for row in self._rows.values() for step in steps]
        save_image(grid(cells, len(steps)), self.path)


def sample_name(prompt: str, seed: int, number: int, again: int = 1) -> str:
    """Return the file name of one image of `davae sample`; `again` counts the sets of one folder and seed."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40] or "picture"
    return f"{words}-seed{seed}{_set(again)}-{number:03d}.png"


def _set(again: int) -> str:
    return f"-set{again}" if again > 1 else ""


def free_places(folder: Path, wanted: list[str], seed: int) -> list[Path]:
    """Return where to write the images of `davae sample` and, last, their grid: names that nothing has yet.

    Raises:
        RunError: a file that davae did not write has one of the first names.
    """
    again = 1
    while True:
        names = [sample_name(prompt, seed, number, again) for number, prompt in enumerate(wanted)]
        places = [folder / name for name in (*names, f"grid-seed{seed}{_set(again)}.png")]
        if again == 1:
            for place in places:
                check_image(place)
        if not any(place.exists() for place in places):
            return places
        again += 1


def read_prompt_texts(path: Path) -> list[str]:
    """Return the prompts of a file, in its order.

    Raises:
        DataError: no such file, another format, no prompts in it.
    """
    return [prompt.text for prompt in read_prompts(path)]


def add_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA of the base into its pipeline, or into an upgraded one, for which it is widened.

    Raises:
        ModelError: a pipeline that loads no LoRA, a file that is not one or does not fit.
    """
    if not isinstance(pipeline, LoraBaseMixin):
        raise ModelError(f"--lora {file}: a {type(pipeline).__name__} loads no LoRA files; leave it out")
    transformer = denoiser(pipeline)
    part = transformer_family(type(transformer).__name__).component
    state, settings = read_lora(file, type(pipeline), part, transformer.config)
    metadata = {"format": "pt"} | ({LORA_ADAPTER_METADATA_KEY: json.dumps(settings)} if settings else {})
    try:
        if MARK in transformer.config:
            state = widen_lora(state, transformer)
        with TemporaryDirectory(prefix="davae-lora-") as folder:
            save_tensors(Path(folder) / "lora.safetensors", state, metadata)
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors")  # type: ignore[attr-defined]
    except (ModelError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--lora {file}: it does not fit this {type(transformer).__name__}: {reason}") from error


def write_sample_file(
    pipeline: str,
    target: Path,
    *,
    num: int,
    labels: Labels,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    on_part: Callable[[int, int], None],
    placement: Placement = FULL,
) -> bool:
    """`davae evaluate samples`: whether the `.npz` is whole (False: other processes still draw their parts)."""
    check_place(target)
    weights = model_fingerprint(model_places(pipeline))
    model, _ = open_model(pipeline, placement)
    if not goes_by_class(model):
        raise ModelError(f"{pipeline} is no class-conditional model; sample files follow the ImageNet protocol")
    state = PartialState()
    schedule = class_schedule(num, class_count(model), labels, seed)

    def draw(classes: list[int], first: int) -> Tensor:
        prompts = [str(number) for number in classes]
        pictures = generate(
            model,
            prompts,
            output_type="pt",
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            first=first,
            batch_size=batch_size,
        )
        return torch.stack(pictures)

    settings = {"labels": labels, "steps": steps, "guidance": guidance, "seed": seed, **placement.changes}
    with saving(target):
        return write_samples(
            target,
            schedule,
            draw,
            settings={**settings, "weights": weights},
            about={"pipeline": pipeline},
            former={**settings, "pipeline": pipeline},
            rank=state.process_index,
            ranks=state.num_processes,
            on_part=on_part,
        )
