"""Text of others in a model card, a report and a figure stays text."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

import davae
from davae import console as display
from davae.analyze.curves import compared_curves
from davae.publish.card import Origin, base_licence, write_card
from davae.publish.escape import as_code, as_prose, encodable, fence
from davae.publish.export import _report as report_of
from davae.recipes import validate
from davae.recipes.sections import Sampling
from davae.runs.report_page import Column, ReportContent, write_report
from davae.train.run_folder import marker, set_aside

HOSTILE = [
    "```\n# Owned\n```",
    "`````\n<script>alert(1)</script>",
    "a\n\n---\nlicense: mit\n---\n",
    "</code></pre><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) | a | b |\n|---|---|",
    "'; rm -rf ~ #",
    '"); import os; os.system("x") #',
    "{{ 7 * 7 }} {% for x in y %}",
    "half \udcff a character",
    "\u2028line\x85s\x0b",
]
INDEX = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
VAE = {"scale": 2, "detail_channels": 8}


def write_configs(folder: Path, transformer: dict[str, Any] | None = None) -> None:
    for part, config in (("vae", VAE), ("transformer", transformer or {})):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))


def recipe_with(prompt: str) -> Any:
    values = {
        "name": "tiny", "base": {"model": "micro", "resolution": 64}, "detail_channels": 8,
        "data": {"source": f"photos/{prompt}"}, "stage1": {"max_steps": 1, "batch_size": 1},
        "stage2": {"max_steps": 1, "batch_size": 1, "warmup_steps": 0},
    }  # fmt: skip
    recipe = validate(values, "tiny")
    return recipe.model_copy(update={"sampling": Sampling(prompts=(prompt,))})


def read_markdown(card: str) -> tuple[dict[str, str], str]:
    """Fenced blocks by language, and the HTML of everything, of a card's body."""
    body = card.split("\n---\n", 1)[1]
    parser = MarkdownIt("commonmark").enable("table")
    return {t.info: t.content for t in parser.parse(body) if t.type == "fence"}, parser.render(body)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_inside_the_card_s_blocks(text: str, tmp_path: Path):
    write_configs(tmp_path)
    row = {"name": text, "psnr": 1.0, "ssim": 1.0, "lite0": 1.0}
    speed = {"name": text, "tokens": 1, "transformer_seconds": 1.0, "whole_seconds": 1.0, "speedup_over_native": 1.0}
    rows = [speed, {**speed, "speedup_over_native": None}]  # of a base that cannot draw the upgrade's size
    report = {"reconstruction": [row], "speed": rows, "facts": {"machine": text}}
    base = text.replace("\udcff", "?")
    for kind, languages in (("fused", ["python", "yaml"]), ("upgrade", ["sh", "python", "yaml"])):
        write_card(tmp_path, Origin(base, kind, False, recipe_with(text), report), INDEX)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        found, shown = read_markdown(card)
        assert list(found) == languages
        assert "photos/" in yaml.safe_load(found["yaml"])["data"]["source"]
        compile(found["python"], "card", "exec")
        assert "os.system" not in re.sub(r'"(\\.|[^"\\])*"', '""', found["python"])
        if kind == "upgrade":
            words = shlex.split(found["sh"], comments=True)
            assert words[:4] == ["davae", "apply", ".", "--base"]
            assert words[7:] == ["davae", "sample", "upgraded", encodable(text)]
        assert ModelCard(card).data.to_dict()["license"] == "unknown"
        assert not re.search(r"<(script|img|/pre>\s*<img)", shown)
        assert "<h1>Owned" not in shown
        assert 'href="javascript' not in shown
        assert shown.count("<table>") == 2
        assert shown.count("<td") == 14, "a name is one cell"
        assert "<td>1.00x</td>" in shown
        assert "<td>-</td>" in shown


def test_a_card_is_about_its_own_model(tmp_path: Path):
    write_configs(tmp_path)
    rows = [
        {"name": name, "psnr": psnr, "ssim": 0.5, "lite0": 0.5}
        for name, psnr in (("base + bicubic", 23.46), ("full", 19.21), ("full, shipped", 29.03))
    ]
    rows.append({"name": "another name", "model": "shipped", "psnr": 31.5, "ssim": 0.5, "lite0": 0.5})
    for written, holdout, words in (
        ({}, 0.1, "Held-out images, encoded"),
        ({}, 0.0, "Training images (the run held none out"),  # a report of a version without the marker
        ({"reconstruction_images": "training"}, 0.1, "Training images (the run held none out"),
        ({"reconstruction_images": "held out"}, 0.0, "Held-out images, encoded"),
    ):
        recipe = recipe_with("x")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"holdout": holdout})})
        report = {"reconstruction": rows, "speed": [], "facts": {"machine": "m"}, **written}
        write_card(tmp_path, Origin("micro", "fused", False, recipe, report), INDEX)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert words in card
        assert "19.21" in card
        assert "23.46" in card
        assert "29.03" not in card
        assert "31.50" not in card


def test_the_card_of_an_upgrade_leads_to_an_image(tmp_path: Path):
    write_configs(tmp_path)
    row = {"name": "full", "psnr": 19.21, "ssim": 0.5, "lite0": 0.5, "pictures": 2}
    report = {"reconstruction": [row], "speed": [], "facts": {"machine": "m"}}
    write_card(tmp_path, Origin("micro", "upgrade", False, recipe_with("a tall house"), report), INDEX)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    found, _ = read_markdown(card)
    assert found["sh"].splitlines()[1] == "davae sample upgraded 'a tall house'"
    assert found["python"].startswith("import davae")
    assert 'StableDiffusion3Pipeline.from_pretrained("upgraded")' in found["python"]
    assert 'pipe("a tall house", ' in found["python"]
    assert "guidance_scale=2.5)" in found["python"]
    assert "2 held-out images, encoded and decoded. full: the upgrade." in card


@pytest.mark.parametrize(
    ("pipeline", "transformer", "embeds", "call"),
    [
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel", None, "guidance_scale=2.5)"),
        ("DetailZImagePipeline", "ZImageTransformer2DModel", None, "guidance_scale=1.5)"),
        ("FluxPipeline", "FluxTransformer2DModel", True, "guidance_scale=2.5, true_cfg_scale=1.0)"),
        ("FluxPipeline", "FluxTransformer2DModel", False, "true_cfg_scale=2.5, negative_prompt=[''])"),
        ("DetailLumina2Pipeline", "Lumina2Transformer2DModel", None, "height=128, width=128, num_inference_steps=30"),
    ],
)
def test_a_card_calls_the_pipeline_as_davae_does(
    pipeline: str, transformer: str, embeds: bool | None, call: str, tmp_path: Path
):
    write_configs(tmp_path, None if embeds is None else {"guidance_embeds": embeds})
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer]}
    write_card(tmp_path, Origin("micro", "fused", False, recipe_with("x"), {}), index)
    assert call in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_report_on_a_shorter_training_is_not_carried(tmp_path: Path):
    recipe = recipe_with("x")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    assert report_of(tmp_path, recipe) == {}, "folders of earlier versions may lack the marker"
    marker(tmp_path, "report").write_text("1/1")
    assert report_of(tmp_path, recipe) == {}
    marker(tmp_path, "report").write_text("1/20")
    assert report_of(tmp_path, recipe) is None
    marker(tmp_path, "report").write_text("1/1")
    set_aside(SimpleNamespace(path=tmp_path, checkpoints=lambda stage: []), "stage2")  # type: ignore[arg-type]
    assert report_of(tmp_path, recipe) is None, "stage 2 begins again on another stage 1"


def test_the_base_s_own_card_cannot_write_into_ours(tmp_path: Path):
    values = {"license": "other", "license_name": "x\n---\n# Owned <b>", "license_link": "a\n---\nb"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(values)}---\n")
    fields, sentence = base_licence(str(tmp_path))
    assert all("\n" not in value for value in fields.values())
    assert "<b>" not in sentence
    assert "\\# Owned" in sentence


def test_escapes():
    assert as_prose("a*b_c_ d_e\n<x> & `y`") == "a\\*b_c\\_ d_e &lt;x&gt; &amp; \\`y\\`"
    assert as_code("a``b") == "``` a``b ```"
    assert as_code("plain") == "`plain`"
    assert fence("a ```` b", None) == "`````"
    assert fence("plain") == "```"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_the_report(text: str, tmp_path: Path):
    image = Image.new("RGB", (8, 8))
    columns = [Column(text, [image], text), Column("b", [image])]
    row = {"name": text, "psnr": 1.0, "ssim": 1.0, "lite0": 1.0, "pictures": 1, "best": True}
    speed = {"name": text, "pixels": 1, "tokens": 1, "transformer_seconds": 1.0, "whole_seconds": 1.0,
             "speedup_over_native": 1.0, "upgraded": True}  # fmt: skip
    content = ReportContent(
        text, text, [(text, text)], text, [text], columns, columns, [speed], [row], {text: b"png"}, [text], text
    )
    page = write_report(content, tmp_path).read_text(encoding="utf-8")
    for tag in ("<script>alert", "<img src=x", "</code>"):
        assert tag not in page
    assert page.count("<script>") == 1


def test_every_template_escapes():
    for path in Path(davae.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "| safe" not in text
        for line in re.findall(r"jinja2\.Environment\(.*", text):
            assert "autoescape=True" in line or path.name == "card.py", "a card is Markdown: its filters escape"


def test_names_of_runs_are_no_formulas():
    records = [{"step": n, "loss_base": 1.0, "loss_detail": 1.0} for n in range(3)]
    assert compared_curves({"a$x^{$": records, "_hidden": records}, ("loss_base",)).startswith(b"\x89PNG")


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "console", Console(width=80))
    display.table("of x[/y]", ["", "[red]"], [["a[/b]", "[bold]1"]])
    shown = capsys.readouterr().out
    for name in ("x[/y]", "[red]", "a[/b]", "[bold]1"):
        assert name in shown
