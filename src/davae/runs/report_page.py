"""Page of a finished run: one HTML file with everything inside, and its figures as JSON."""

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
from davae.runs.crops import magnify_crop, most_different, squared_error


@dataclass
class Column:
    """One variant of an image grid.

    Attributes:
        role: `own`, made by the run that the page is about; `shipped`, made by the upgrade that comes with davae.
    """

    title: str
    images: list[Image.Image]
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
    """Return the place of the run's own column, else of the last that is not shipped."""
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
    """One place of one row of images, enlarged: the columns `between` differ most there."""

    caption: str
    left: int  # pixels
    top: int
    side: int
    between: tuple[str, str]
    images: list[tuple[str, Image.Image]]  # title of the column, crop


JPEG_ABOVE = 512  # pixels, above which images are stored as JPEG
ZOOMED = 3  # rows that are zoomed into
ZOOM = 4  # a crop is 1/ZOOM of the image's side


def zooms(columns: list[Column], captions: list[str], first: int, second: int) -> list[Zoom]:
    """Return crops of the rows in which two columns differ most, the most different first."""
    rows = range(len(columns[0].images))
    side = max(1, columns[0].images[0].width // ZOOM) if rows else 1
    found = []
    for row in rows:
        pair = columns[first].images[row], columns[second].images[row]
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
            [(column.title, magnify_crop(column.images[row], left, top, side, times)) for column in columns],
        )
        for _, row, left, top in sorted(found, reverse=True)[:ZOOMED]
    ]


def data_uri(image: Image.Image | bytes) -> str:
    """Return an image for inside the page: a PNG, or a JPEG where it is large."""
    if isinstance(image, bytes):
        return _inline("png", image)
    buffer = io.BytesIO()
    if image.width > JPEG_ABOVE:
        image.save(buffer, format="JPEG", quality=93)
        return _inline("jpeg", buffer.getvalue())
    image.save(buffer, format="PNG", optimize=True)
    return _inline("png", buffer.getvalue())


def _inline(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def write_report(content: ReportContent, folder: Path) -> Path:
    """Write `report.html` and `report.json` into `folder` and return the page's path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"data_uri": data_uri, "duration": duration}
    template = environment.from_string(files("davae.runs").joinpath("report_page.html").read_text(encoding="utf-8"))
    samples, decoded = content.samples, content.reconstructions
    place = f"{content.reconstruction_images} image" if content.reconstruction_images == "training" else "held out"
    close = [
        *zooms(samples, content.prompts, 0, own_column(samples)),
        *zooms(decoded, [place] * len(decoded[0].images), 1, own_column(decoded)),
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
    shown = {"own": own_column(samples), "best": best_rows(content.quality), "large": JPEG_ABOVE}
    atomic_text(page, template.render(c=content, zooms=close, **shown))
    return page
