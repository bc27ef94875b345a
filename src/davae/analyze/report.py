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

from davae.train.state import replace_text


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


def data_uri(picture: Image.Image | bytes) -> str:
    """A picture as an inline PNG."""
    if isinstance(picture, bytes):
        encoded = picture
    else:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        encoded = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def write_report(content: ReportContent, folder: Path) -> Path:
    """Write `report.html` and `report.json` into `folder`; returns the page's path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_uri"] = data_uri
    template = environment.from_string(files("davae.analyze").joinpath("report.html").read_text(encoding="utf-8"))
    figures = {
        "title": content.title,
        "facts": dict(content.facts),
        "prompts": content.prompts,
        "speed": content.speed,
        "reconstruction": content.quality,
        "skipped": content.skipped,
    }
    page = folder / "report.html"
    replace_text(folder / "report.json", json.dumps(figures, indent=2))
    replace_text(page, template.render(c=content))
    return page
