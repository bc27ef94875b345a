"""Tables of the paper: every row validates, runs are shared and done once, and the table is what the runs say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import tiny_upgrade_recipe
from safetensors.torch import load_file, save_file

from davae import reproduction
from davae.recipes.tables import Scale, Table, load_table, table_names
from davae.reproduction import finished, jobs, markdown, run_job, table_rows


@pytest.mark.parametrize("scale", ["micro", "paper"])
@pytest.mark.parametrize("name", table_names())
def test_every_row_of_every_table_is_a_valid_recipe(name: str, scale: str):
    todo = jobs(name, scale, 2, [])  # type: ignore[arg-type]
    rows = load_table(name).rows
    networks = 0 if scale == "micro" else sum(row.upscale == "network" for row in rows)  # none trained at that scale
    assert len(todo) == sum(1 if row.upscale else 2 for row in rows) - networks
    assert len({job.key for job in todo}) == len(todo)
    for job in todo:
        for path, value in next(row for row in rows if row.name == job.row).set.items():
            section, field = path.split(".")
            assert getattr(getattr(job.recipe, section), field) == value


def test_rows_that_differ_in_stage_2_alone_share_stage_1():
    full, no_fade, no_align, random = jobs("table5", "micro", 1, [])
    assert full.stage1_key == no_fade.stage1_key == random.stage1_key != no_align.stage1_key
    other_seed = jobs("table5", "micro", 2, [])[4]
    assert other_seed.stage1_key == full.stage1_key
    assert other_seed.key != full.key
    same = next(job for job in jobs("table4", "micro", 1, []) if job.row == "lambda_align = 0.5")
    assert same.key == full.key  # two tables, one run


@pytest.fixture
def tiny_scale(tiny_base: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, picture_folder)))
    scale = Scale.model_validate(
        {
            "recipe": str(recipe),
            "set": {},
            "seeds": 2,
            "generation": {"data": str(picture_folder), "num": 4, "steps": 1, "guidance": 1.0, "features": "lite0"},
            "reconstruction": {"data": str(picture_folder), "num": 4},
            "super_resolution": None,
        }
    )
    table = Table.model_validate(
        {
            "title": "Tiny",
            "claim": "none",
            "rows": [
                {"name": "full"},
                {"name": "no fade", "set": {"stage2.warmup_steps": 0}},
                {"name": "enlarged", "upscale": "bilinear"},
            ],
        }
    )
    monkeypatch.setattr(reproduction, "load_scale", lambda name: scale)
    monkeypatch.setattr(reproduction, "load_table", lambda name: table)
    return tmp_path


def test_runs_are_done_once_and_make_the_table(tiny_scale: Path):
    results = tiny_scale / "results"
    todo = jobs("tiny", "micro", 2, [])
    told: list[str] = []
    for job in todo[:4]:
        run_job(job, tiny_scale / "out", results, lambda progress: told.append(progress.task))
    assert len(list((tiny_scale / "out" / "stage1").iterdir())) == 1
    assert told.count("stage1") == 4  # once, not once a row
    first = finished(todo[0], results)
    assert first is not None
    assert first["recipe"]["stage2"]["warmup_steps"] == 2
    assert first["generation"]["generated"] == 4

    before = len(told)
    assert run_job(todo[0], tiny_scale / "out", results, lambda progress: told.append(progress.task)) == first
    assert len(told) == before

    headings, lines = table_rows(todo, results)
    assert [line[0] for line in lines] == ["full", "no fade", "enlarged"]
    assert [line[-1] for line in lines] == ["2", "1", "1"]
    assert lines[2][headings.index("PSNR, dB")] == "-"  # enlarging encodes nothing
    column = headings.index("FD-lite0")
    distances = [json.loads((results / f"{todo[n].key}.json").read_text())["generation"]["fd_lite0"] for n in (0, 3)]
    assert lines[0][column].startswith(f"{sum(distances) / 2:.2f} ± ")
    assert "±" not in lines[1][column]
    assert markdown(headings, lines).splitlines()[1] == "|" + " --- |" * len(headings)


def test_a_new_default_changes_no_hash():
    job = jobs("table5", "micro", 1, [])[0]
    plain = job.recipe.model_copy(update={"name": "other"})
    assert reproduction.Job(job.row, 0, plain, job.measures, "").key == job.key
    longer = job.recipe.model_copy(update={"stage2": job.recipe.stage2.model_copy(update={"max_steps": 7})})
    assert reproduction.Job(job.row, 0, longer, job.measures, "").key != job.key


def test_new_weights_of_the_base_make_figures_due_again(tiny_scale: Path, tiny_base: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    before = jobs("tiny", "micro", 1, [f"base.model={copy}"])
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    keys = [job.key for job in before]
    state = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    reproduction.model_digest.cache_clear()
    after = jobs("tiny", "micro", 1, [f"base.model={copy}"])
    assert all(old != new.key for old, new in zip(keys, after, strict=True))
