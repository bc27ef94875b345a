"""The report's page on its own: it needs nothing from elsewhere, and shows what its JSON says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae.durations import duration
from davae.runs.crops import most_different
from davae.runs.report_page import Column, ReportContent, data_uri, write_report, zooms


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
    assert np.asarray(found[0].images[1][1]).reshape(-1, 3).std(0).max() == 0  # the marked square, all of it
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


def with_a_shipped_upgrade() -> ReportContent:
    found = content()
    plain, other = marked(64, None), marked(64, (0, 32, 16, 48))
    found.samples[1].role = "own"
    found.samples.append(Column("shipped", [other] * 2, role="shipped"))
    found.reconstructions[2].role = "own"
    found.reconstructions.append(Column("full, shipped", [plain], role="shipped"))
    rows = {"base + bicubic": (23.46, 0.93, 0.14), "full": (19.21, 0.95, 0.20), "full, shipped": (23.0, 0.90, 0.05)}
    found.quality = [
        {"name": name, "psnr": p, "ssim": s, "lite0": d, "pictures": 1} for name, (p, s, d) in rows.items()
    ]
    return found


def test_the_run_s_own_model_comes_first_and_best_is_best(tmp_path: Path):
    page = write_report(with_a_shipped_upgrade(), tmp_path).read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    right = re.search(r'<select id="right">(.*?)</select>', page, re.S)
    assert right is not None
    assert '<option value="1" selected>this run</option>' in right[1], "the slider opens on the run's own model"
    assert [zoom["between"] for zoom in figures["zooms"]] == [
        ["base, enlarged", "this run"], ["base, enlarged", "this run"], ["base + bicubic", "full"],
    ]  # fmt: skip
    assert figures["zooms"][0]["top"] == 12, "the place is chosen by the run's own images"
    assert re.findall(r'<td class="best">([\d.]+)</td>', page) == ["23.46", "0.9500", "0.0500"]


@pytest.mark.parametrize("kind", ["held out", "training"])
def test_training_images_are_never_called_held_out(kind: str, tmp_path: Path):
    found = content()
    found.reconstruction_images = kind  # type: ignore[assignment]
    page = write_report(found, tmp_path).read_text(encoding="utf-8").lower()
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert figures["reconstruction_images"] == kind
    held = re.sub(r"<style>.*?</style>|data\.holdout", "", page, flags=re.S)
    assert ("held out" in held or "held-out" in held) == (kind == "held out")
    assert figures["zooms"][-1]["caption"] == ("held out" if kind == "held out" else "training image")


def test_phases_are_shown_with_their_times(tmp_path: Path):
    found = content()
    found.phases = {"stage1": 12.0, "stage2": 3725.0}
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert "<td>12 s</td><td>1 h 2 min</td>" in page
    assert [duration(s) for s in (0.25, 59.6, 3600, 100_000)] == ["0.2 s", "1 min", "1 h", "1 d 3 h"]


def test_large_pictures_are_stored_as_jpeg():
    assert data_uri(marked(64, None)).startswith("data:image/png")
    assert data_uri(marked(1024, None)).startswith("data:image/jpeg")
