"""`davae evaluate enlarging` on tiny models: its figures, and its bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upgraded_tiny import assembled

from davae.cli import app
from davae.errors import DavaeError


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "upgraded"
    assembled(tiny_base).save_pretrained(folder)
    return folder


def run(model: Path, data: Path, *more: str) -> tuple[int, str]:
    words = ["evaluate", "enlarging", "--model", str(model), "--data", str(data), "--held-out", "0"]
    result = CliRunner().invoke(app, [*words, "--steps", "1", "--patch-size", "8", *more])
    return result.exit_code, result.output


def test_every_method_has_the_same_figures(model: Path, picture_folder: Path, tmp_path: Path):
    code, shown = run(model, picture_folder, "--num", "4", "--json", str(tmp_path / "figures.json"))
    assert code == 0, shown
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["rows"]) == ["bicubic", "lanczos", "upgrade", "originals, decoded"]
    assert (figures["images"], figures["to"]) == (4, 2 * figures["from"])
    assert (figures["steps"], figures["guidance_scale"], figures["seed"]) == (1, 1.0, 0)
    names = {tuple(row) for row in figures["rows"].values()}
    assert len(names) == 1
    assert {"psnr", "reduced_psnr", "lite0", "seconds", "fd_lite0"} <= set(*names)
    for name in ("upgrade", "originals, decoded"):  # faithful: they give the input again
        assert figures["rows"][name]["reduced_psnr"] > 30
    assert run(model, picture_folder, "--num", "4", "--no-faithful", "--json", str(tmp_path / "raw.json"))[0] == 0
    raw = json.loads((tmp_path / "raw.json").read_text())
    for name in ("upgrade", "originals, decoded"):
        assert raw["rows"][name]["reduced_psnr"] < figures["rows"][name]["reduced_psnr"] - 3


def test_a_held_out_share_without_images_and_an_unknown_method_are_one_line(model: Path, picture_folder: Path):
    words = ["evaluate", "enlarging", "--model", str(model), "--data", str(picture_folder), "--held-out"]
    for more, message in (
        (["0.0001"], f"{picture_folder}: no held-out image at share 0.0001; take another share"),
        (["0.0001", "--method", "sharpest"], "enlarger sharpest: neither bilinear"),  # before the images are read
    ):
        with pytest.raises(DavaeError, match=message):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)


def test_fewer_than_four_images_are_refused_at_once(picture_folder: Path):
    code, shown = run(Path("no-model"), picture_folder, "--num", "3")
    assert code == 2
    assert "--num" in shown
    assert "equal to 4" in shown
