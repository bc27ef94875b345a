"""The page a run leaves behind: one HTML file with everything inside, and its figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
from PIL import Image

from davae.durations import duration
from davae.files.atomic import atomic_text
from davae.runs.crops import enlarged, most_different, squared_error


@dataclass
class Column:
    """One variant of an image grid.

    Attributes:
        role: `own`, made by the run that the page is about; `shipped`, made by the upgrade that comes with davae.
    """

    title: str
    pictures: list[Image.Image]
    note: str = ""
    role: Literal["", "own", "shipped"] = ""


@dataclass
class ReportContent:
    """Content of the page.

    Attributes:
        reconstruction_images: where the reconstructed images come from: `held out`, or `training`, where none is held out.
        phases: seconds that each phase of the run took, by its name.
    """

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
    reconstruction_images: Literal["held out", "training"] = "held out"
    phases: dict[str, float] = field(default_factory=dict)


# metric -> whether a higher value is better
METRICS = {"psnr": True, "ssim": True, "lite0": False}


def own_column(columns: list[Column]) -> int:
    """Return the place of the run's own column: the last one that is not the shipped upgrade's where none is marked."""
    own = [place for place, column in enumerate(columns) if column.role == "own"]
    others = [place for place, column in enumerate(columns) if column.role != "shipped"]
    return (own or others)[-1]


def best_rows(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return, for each metric, the places of the rows with the best value."""
    found = {}
    for name, higher in METRICS.items():
        values = [row[name] for row in rows]
        best = (max if higher else min)(values, default=None)
        found[name] = [place for place, value in enumerate(values) if value == best]
    return found


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
    environment.filters |= {"data_uri": data_uri, "duration": duration}
    template = environment.from_string(files("davae.runs").joinpath("report_page.html").read_text(encoding="utf-8"))
    samples, decoded = content.samples, content.reconstructions
    place = f"{content.reconstruction_images} image" if content.reconstruction_images == "training" else "held out"
    close = [
        *zooms(samples, content.prompts, 0, own_column(samples)),
        *zooms(decoded, [place] * len(decoded[0].pictures), 1, own_column(decoded)),
    ]
    figures = {
        "title": content.title,
        "facts": dict(content.facts),
        "prompts": content.prompts,
        "speed": content.speed,
        "reconstruction": content.quality,
        "reconstruction_images": content.reconstruction_images,
        "phases": content.phases,
        "zooms": [
            {"caption": z.caption, "left": z.left, "top": z.top, "side": z.side, "between": z.between} for z in close
        ],
        "skipped": content.skipped,
    }
    page = folder / "report.html"
    atomic_text(folder / "report.json", json.dumps(figures, indent=2))
    shown = {"own": own_column(samples), "best": best_rows(content.quality), "large": LARGE}
    atomic_text(page, template.render(c=content, zooms=close, **shown))
    return page
