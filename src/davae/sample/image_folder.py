"""What `davae sample` and `davae evaluate samples` do: images of a model into files that davae may write over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from davae.data.images import grid
from davae.data.prompts import read_prompts
from davae.files.outputs import check_image, save_image
from davae.sample.generate import generate
from davae.sample.open import check_classes
from davae.sample.preview import Preview


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
