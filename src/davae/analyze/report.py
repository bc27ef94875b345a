"""The page a run leaves behind: one HTML file with everything inside, and its figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from davae.analyze.crops import enlarged, most_different, squared_error
from davae.files import atomic_text


@dataclass
class Column:
    """One variant of a picture grid."""

    title: str
    pictures: list[Image.Image]
    note: str = ""


@dataclass
class ReportContent:
    """What the page shows. Tables are lists of rows of text or numbers, the first row the heading."""

    title: str
    lead: str
    facts: list[tuple[str, str]]
    command: str
    prompts: list[str]
    samples: list[Column]
    reconstructions: list[Column]
    speed: list[dict[str, Any]]
    quality: list[dict[str, Any]]
    curves: dict[str, bytes | None]
    skipped: list[str] = field(default_factory=list)
    credits: str = ""


@dataclass
class Zoom:
    """One place of one row of pictures, enlarged: where `between`, two of the columns, differ most."""

    caption: str
    left: int  # pixels
    top: int
    side: int
    between: tuple[str, str]
    pictures: list[tuple[str, Image.Image]]  # title of the column, crop


LARGE = 512  # pixels, above which pictures are stored as JPEG
ZOOMED = 3  # rows that are zoomed into
ZOOM = 4  # a crop is 1/ZOOM of the picture's side


def zooms(columns: list[Column], captions: list[str], first: int, second: int) -> list[Zoom]:
    """Crops of the rows in which column `second` differs most from column `first`, the most different one first."""
    rows = range(len(columns[0].pictures))
    side = max(1, columns[0].pictures[0].width // ZOOM) if rows else 1
    found = []
    for row in rows:
        pair = columns[first].pictures[row], columns[second].pictures[row]
        left, top = most_different(*pair, side)
        found.append((squared_error(*pair, (left, top, left + side, top + side)), row, left, top))
    times = max(1, 160 // side)
    between = columns[first].title, columns[second].title
    return [
        Zoom(
            captions[row],
            left,
            top,
            side,
            between,
            [(column.title, enlarged(column.pictures[row], left, top, side, times)) for column in columns],
        )
        for _, row, left, top in sorted(found, reverse=True)[:ZOOMED]
    ]


def data_uri(picture: Image.Image | bytes) -> str:
    """A picture for inside the page: a PNG, or a JPEG where it is large."""
    if isinstance(picture, bytes):
        return _inline("png", picture)
    buffer = io.BytesIO()
    if picture.width > LARGE:
        picture.save(buffer, format="JPEG", quality=93)
        return _inline("jpeg", buffer.getvalue())
    picture.save(buffer, format="PNG", optimize=True)
    return _inline("png", buffer.getvalue())


def _inline(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def write_report(content: ReportContent, folder: Path) -> Path:
    """Write `report.html` and `report.json` into `folder`; returns the page's path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_uri"] = data_uri
    template = environment.from_string(files("davae.analyze").joinpath("report.html").read_text(encoding="utf-8"))
    close = [
        *zooms(content.samples, content.prompts, 0, len(content.samples) - 1),
        *zooms(
            content.reconstructions,
            ["held out"] * len(content.reconstructions[0].pictures),
            1,
            len(content.reconstructions) - 1,
        ),
    ]
    figures = {
        "title": content.title,
        "facts": dict(content.facts),
        "prompts": content.prompts,
        "speed": content.speed,
        "reconstruction": content.quality,
        "zooms": [
            {"caption": z.caption, "left": z.left, "top": z.top, "side": z.side, "between": z.between} for z in close
        ],
        "skipped": content.skipped,
    }
    page = folder / "report.html"
    atomic_text(folder / "report.json", json.dumps(figures, indent=2))
    atomic_text(page, template.render(c=content, zooms=close, large=LARGE))
    return page
