"""Figure files: a PNG to look at and a JSON of its numbers, in one folder."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from davae.data.formats import open_image
from davae.dataset.look import check_summary, data_figures
from davae.files.outputs import check_figures, check_image, save_image, write_figures
from davae.files.reading import load_json
from davae.recipes.sections import Data

ORIGIN = ("run", "vae", "unaligned", "base", "data")  # keys of what a figure was made of: names, and not measures


def check_figure(out: Path, name: str) -> None:
    """Refuse the names of a figure where davae did not write the files that have them.

    Args:
        out: folder of the figure.
        name: its name, without a suffix.

    Raises:
        RunError: in one line, what is there.
    """
    check_image(out / f"{name}.png")
    check_figures(out / f"{name}.json")


def free_name(out: Path, name: str, figures: dict[str, Any]) -> str:
    """Return a name for a figure that no figure of other models or data has.

    Args:
        figures: values of the new figure; what it was made of is under `run`, `vae`, `unaligned`, `base`, `data`, `settings`.
    """

    def origin(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            return {}
        compared = {name: row["run"] for name, row in values.items() if isinstance(row, dict) and "run" in row}
        names = {key: values[key] for key in ORIGIN if isinstance(values.get(key), str)}
        return {**names, "settings": values.get("settings"), "compared": compared}

    again, chosen = 1, name
    while (out / f"{chosen}.png").exists() or (out / f"{chosen}.json").exists():
        check_figure(out, chosen)
        try:
            there = load_json((out / f"{chosen}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if origin(there) == origin(json.loads(json.dumps(figures))):
            break
        again += 1
        chosen = f"{name}-{again}"
    return chosen


def summary_file(out: Path, name: str, figures: dict[str, Any]) -> Path:
    """Check a figure's files, and return that of its data's summary, by the name it will get.

    Args:
        out, name: folder of the figure, and its name without a suffix.
        figures: what it is made of, as `free_name` takes it.

    Raises:
        RunError: in one line, which file is not of davae.
    """
    check_figure(out, name)
    path = out / f"{free_name(out, name, figures)}.data.json"
    check_summary(path)
    return path


def write_figure(out: Path, name: str, image: bytes | Image.Image, figures: dict[str, Any]) -> Path:
    """Write `name.png` and `name.json` into a folder, and return the image's path.

    A figure of another run, model or data that has the name already is kept: the new one is `name-2`, `name-3`, ...

    Args:
        out: folder of the figure.
        name: its name, without a suffix.
        image: PNG bytes or an image.
        figures: values for the `.json`.
    """
    name = free_name(out, name, figures)
    path = out / f"{name}.png"
    save_image(open_image(io.BytesIO(image)) if isinstance(image, bytes) else image, path)
    write_figures(out / f"{name}.json", figures)
    return path


def figure_settings(data: str | Data, num: int, held_out: float, **more: Any) -> dict[str, Any]:
    """Return the settings that distinguish a figure from others of its name.

    Args:
        data: the images, with the options of their source.
        num, held_out: number of images, and share that is held out.
        more: settings of this figure; a file is a path.
    """
    more = {name: str(value) if isinstance(value, Path) else value for name, value in more.items()}
    options = {key: value for key, value in data_figures(data).items() if key == "options"}
    return {"num": num, "held_out": held_out, **options, **more}


def contact_sheet(rows: dict[str, list[Image.Image]], cell: int) -> Image.Image:
    """Return images in named rows, on white.

    Args:
        rows: name -> images.
        cell: side of an image on the sheet, pixels.
    """
    font, gap = ImageFont.load_default(13), 4
    label = max(120, 16 + math.ceil(max(font.getlength(name) for name in rows)))
    columns = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (label + columns * (cell + gap), len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (name, images) in enumerate(rows.items()):
        top = line * (cell + gap)
        draw.text((6, top + cell // 2 - 8), name, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (label + column * (cell + gap), top))
    return sheet


SHOWN = 8  # images in a figure
