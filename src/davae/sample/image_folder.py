"""Image files and their grid, under names that no file has yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from davae.data.images import grid
from davae.data.prompts import read_prompts
from davae.files.atomic import make_folder, saving
from davae.files.outputs import check_image, save_image
from davae.pretrained.lora_files import check_lora_file
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, add_lora, check_class_prompts, open_model
from davae.sample.preview import Preview

ON_SHEET = 64  # most images on the grid; a sheet of previews grows until as many are drawn


def draw_samples(
    model: str,
    prompts: Sequence[str],
    options: SamplingOptions,
    *,
    prompt_file: Path | None = None,
    folder: Path | None = None,
    num: int = 4,
    negative_prompt: str | None = None,
    lora: Path | None = None,
    preview: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Open a model, write images of prompts with `sample_to_folder`, and return the grid's path.

    Args:
        model: the model, by the names that `open_model` takes.
        prompts: texts or classes.
        options: how the images are drawn.
        prompt_file: file of more prompts.
        folder: folder of the images; None is the model's own.
        num: images a prompt.
        negative_prompt: text to guide away from; None is the pipeline's own.
        lora: a LoRA of the base to load.
        preview: steps between two previews of the base; None draws no previews.
        on_batch: called with the images that are done and their number.

    Raises:
        DataError: a prompt file that cannot be read.
        ModelError: a model or LoRA that cannot be opened, and as `sample_to_folder`.
    """
    if lora is not None:
        check_lora_file(lora)
    more = read_prompts(prompt_file) if prompt_file is not None else []

    def prepare(pipeline: Any) -> None:
        if lora is not None:
            add_lora(pipeline, lora)

    pipeline, own = open_model(model, options.placement, prepare)
    high, wide = options.resolution if isinstance(options.resolution, tuple) else (options.resolution,) * 2
    shown = None if preview is None else Preview(pipeline, preview, height=high, width=wide)
    texts = [*prompts, *(prompt.text for prompt in more)]
    return sample_to_folder(
        pipeline, texts, folder or own, options,
        num=num, on_batch=on_batch, negative_prompt=negative_prompt, preview=shown,
    )  # fmt: skip


def sample_to_folder(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    options: SamplingOptions,
    *,
    num: int,
    on_batch: Callable[[int, int], None],
    negative_prompt: str | None = None,
    preview: Preview | None = None,
) -> Path:
    """Write images of prompts and one grid of the first `ON_SHEET` of them, a row a prompt.

    Images of an earlier call are kept: where one of the names is taken, all get the next free `set2`, `set3`, ...

    Args:
        pipeline: the pipeline that draws.
        prompts: texts or classes.
        folder: folder of the images.
        options: how the images are drawn.
        num: images a prompt.
        on_batch: called with the images that are done and their number.
        negative_prompt: text to guide away from; None is the pipeline's own.
        preview: its images are written next to the grid, as `previews-<grid>`, while they are drawn, see `Strip`.

    Returns:
        The grid's path.

    Raises:
        ModelError: a class that the model lacks, an image that is not finite; those before it are written.
        RunError: files of these names are there, and davae did not write them.
    """
    check_class_prompts(pipeline, prompts)
    repeated = [prompt for prompt in prompts for _ in range(num)]
    *places, sheet = free_places(folder, repeated, options.seed)
    with ExitStack() as unfilled:
        unfilled.callback(sheet.unlink, missing_ok=True)
        strip = Strip(sheet.with_name(f"previews-{sheet.name}"))
        if preview is not None:
            check_image(strip.path)
            preview.on_preview = strip.add
        shown: list[Any] = []
        for start in range(0, len(repeated), options.batch_size):
            part = repeated[start : start + options.batch_size]
            strip.first = start
            drawn = generate(pipeline, part, options, first=start, negative_prompt=negative_prompt, preview=preview)
            for place, image in zip(places[start:], drawn, strict=False):
                save_image(image, place)
            shown += drawn[: ON_SHEET - len(shown)]
            on_batch(start + len(part), len(repeated))
        save_image(grid(shown, min(num, len(shown))), sheet)
        unfilled.pop_all()
    return sheet


class Strip:
    """Sheet of previews, a row an image and a column a step, written with every preview.

    After the first `ON_SHEET` images it holds those that are being drawn alone.

    Attributes:
        first: row of the first image of the batch that is drawn.
    """

    def __init__(self, path: Path):
        self.path, self.first = path, 0
        self._rows: dict[int, dict[int, Any]] = {}

    def add(self, step: int, images: list[Any]) -> None:
        """Put the images of a step into their rows."""
        if self.first >= ON_SHEET:
            self._rows = {row: cells for row, cells in self._rows.items() if row >= self.first}
        for row, image in enumerate(images, self.first):
            self._rows.setdefault(row, {})[step] = image
        steps = sorted({step for row in self._rows.values() for step in row})
        blank = Image.new("RGB", images[0].size, "white")
        cells = [row.get(step, blank) for row in self._rows.values() for step in steps]
        save_image(grid(cells, len(steps)), self.path)


def sample_name(prompt: str, seed: int, number: int, again: int = 1) -> str:
    """Return the file name of one image of `davae sample`.

    Args:
        prompt: its prompt, of which the first 40 characters are used.
        seed, number: seed of the images, number of the image.
        again: number of the set of images of this folder and seed, from 1.
    """
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40] or "picture"
    return f"{words}-seed{seed}{_set(again)}-{number:03d}.png"


def _set(again: int) -> str:
    return f"-set{again}" if again > 1 else ""


def free_places(folder: Path, prompts: list[str], seed: int) -> list[Path]:
    """Return free file names for the images of `davae sample` and, last, for their grid.

    The grid is there at once, empty: no other call of this seed takes these names.

    Args:
        folder: folder of the images, which is made.
        prompts, seed: the prompt of each image, the seed of all.

    Raises:
        RunError: a file that davae did not write has one of the first names.
    """
    again = 1
    while True:
        names = [sample_name(prompt, seed, number, again) for number, prompt in enumerate(prompts)]
        *places, sheet = (folder / name for name in (*names, f"grid-seed{seed}{_set(again)}.png"))
        if again == 1:
            for place in (*places, sheet):
                check_image(place)
        with saving(sheet):
            make_folder(folder)
            with suppress(FileExistsError):
                sheet.touch(exist_ok=False)
                if not any(place.exists() for place in places):
                    return [*places, sheet]
                sheet.unlink()
        again += 1
