"""The report's page on its own: it needs nothing from elsewhere, and shows what its JSON says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from davae.analyze.crops import most_different
from davae.analyze.report import Column, ReportContent, data_uri, write_report, zooms


def marked(size: int, box: tuple[int, int, int, int] | None) -> Image.Image:
    picture = Image.new("RGB", (size, size), "white")
    if box is not None:
        picture.paste((200, 0, 0), box)
    return picture


def content(size: int = 64) -> ReportContent:
    plain, small, large = marked(size, None), marked(size, (4, 4, 6, 6)), marked(size, (40, 12, 56, 28))
    samples = [Column("base, enlarged", [plain] * 2), Column("this run", [small, large])]
    decoded = [Column("original", [large]), Column("base + bicubic", [plain]), Column("full", [large])]
    quality = [{"name": "full", "psnr": 28.765, "ssim": 0.97654, "lite0": 0.04321, "pictures": 1, "best": True}]
    speed = [
        {
            "name": "upgraded", "pixels": size, "tokens": 16, "transformer_seconds": 0.5, "whole_seconds": 0.75,
            "speedup_over_native": 2.25, "upgraded": True,
        }
    ]  # fmt: skip
    return ReportContent(
        title="a <title> & more",
        lead="what it is",
        facts=[("pixels", "32² → 64²")],
        command="davae upgrade x --out y",
        prompts=["a <b>", "a rose"],
        samples=samples,
        reconstructions=decoded,
        speed=speed,
        quality=quality,
        curves={"Stage 1": None},
    )


def test_crops_lie_where_the_difference_is_largest():
    found = zooms(content().samples, ["first", "second"], 0, 1)
    assert [z.caption for z in found] == ["second", "first"]
    assert (found[0].left, found[0].top, found[0].side) == (40, 12, 16)
    assert np.asarray(found[0].pictures[1][1]).reshape(-1, 3).std(0).max() == 0  # the marked square, all of it
    assert most_different(marked(8, None), marked(8, (5, 6, 7, 8)), 2) == (5, 6)


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path):
    page = write_report(content(), tmp_path).read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "a &lt;title&gt; &amp; more" in page
    assert "a &lt;b&gt;" in page
    for shown in ("28.77", "0.9765", "0.0432", "2.25x", "davae upgrade x --out y"):
        assert shown in page
    assert 'type="range"' in page
    assert "prefers-color-scheme: dark" in page
    assert figures["reconstruction"][0]["psnr"] == 28.765
    assert figures["zooms"][0] == {
        "caption": "a rose", "left": 40, "top": 12, "side": 16, "between": ["base, enlarged", "this run"],
    }  # fmt: skip


def test_large_pictures_are_stored_as_jpeg():
    assert data_uri(marked(64, None)).startswith("data:image/png")
    assert data_uri(marked(1024, None)).startswith("data:image/jpeg")
