"""Tables of the paper: every row validates, runs are shared and done once, and the table is what the runs say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import tiny_upgrade_recipe
from safetensors.torch import load_file, save_file
from test_docs import parse
from test_training import run_cli

from davae.errors import RecipeError
from davae.lab.reproduce import figures as figures_module
from davae.lab.reproduce import job as job_module
from davae.lab.reproduce import runs as runs_module
from davae.lab.reproduce.choose import ONCE, jobs
from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, PlannedJob, UpgradeJob, model_digest
from davae.lab.reproduce.runs import finished, measure_speed, run_job, timed_jobs
from davae.lab.reproduce.tables import Scale, ScaleName, Table, load_table, overrides_for, table_names
from davae.lab.reproduce.tabulate import markdown, table_rows
from davae.recipes import BaseRecipe, Recipe
from davae.recipes.sections import Data

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/reproduce"
MEASURED_HEADINGS = ["", "FD-lite0", "KID-lite0", "precision", "recall", "seeds"]


@pytest.mark.parametrize("scale", ["micro", "gpu", "clothing", "paper"])
@pytest.mark.parametrize("name", table_names())
def test_every_row_of_every_table_is_a_valid_recipe(name: str, scale: ScaleName):
    rows = load_table(name).rows_at(scale)
    if not rows:  # its rows name other models than the scale's
        assert scale == "clothing"
        assert name in ("table1", "table2", "table3")
        with pytest.raises(
            RecipeError, match=f"{name} has no rows at the scale clothing; these tables have: gains, table4"
        ):
            jobs(name, scale, 2, [])
        return
    todo = jobs(name, scale, 2, [])
    networks = 0 if scale != "paper" else sum(row.upscale == "network" for row in rows)  # none trained at that scale
    assert len(todo) == sum(1 if row.kind in ONCE else 2 for row in rows) - networks
    assert len({job.key for job in todo}) == len(todo)
    for job in todo:
        row = next(row for row in rows if row.name == job.row)
        if row.kind in ("drawn", "planned"):
            assert not row.set
            continue
        for path, value in row.set.items():
            found = job.recipe  # type: ignore[attr-defined]
            for part in path.split("."):
                found = getattr(found, part)
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_rows_that_differ_in_stage_2_alone_share_stage_1():
    full, no_fade, no_align, random = upgrades("table5", 1)
    assert full.stage1_key == no_fade.stage1_key == random.stage1_key != no_align.stage1_key
    other_seed = upgrades("table5", 2)[4]
    assert other_seed.stage1_key == full.stage1_key
    assert other_seed.key != full.key
    same = next(job for job in jobs("table4", "micro", 1, []) if job.row == "lambda_align = 0.5")
    assert same.key == full.key  # two tables, one run
    assert upgrades("table1", 1)[0].key == full.key  # and a third


def upgrades(table: str, seeds: int) -> list[UpgradeJob]:
    return [job for job in jobs(table, "micro", seeds, []) if isinstance(job, UpgradeJob)]


# Runs under these hashes were made or begun: they stay theirs. Those of 32 detail channels were the tables' own before 48.
BEGUN = {
    ("table5", "full", 32): ("deeefdd17db76ceb", "9e3a168b975a47e6"),
    ("table4", "lambda_align = 0", 32): ("9427f20822e1cefa", "4b0ec67d40b0b26a"),
    ("table4", "lambda_align = 0.1", 32): ("4059b6ea297276fa", "2f6e2475e3236c6d"),
    ("table4", "lambda_align = 1.0", 32): ("275ec31ad803945f", "b03d01c2cc889542"),
    ("table5", "without the fade-in", 32): ("caacbcd6108a9b87", "9e3a168b975a47e6"),
    ("table5", "full", 48): ("ce56ba6b30ec48a5", "656bb3d8bed2c6b4"),
    ("table5", "without alignment", 48): ("a3745f4dd0c6f927", "3cdfcd26fe1de8be"),
    ("table5", "without the fade-in", 48): ("b76447d9d68ab9ee", "656bb3d8bed2c6b4"),
    ("table5", "without zero initial weights", 48): ("a8ffc2fd0fcd3a42", "656bb3d8bed2c6b4"),
}


def test_hashes_of_runs_that_were_begun_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_module, "model_digest", lambda model: "WEIGHTS")
    for (table, row, channels), (key, stage1_key) in BEGUN.items():
        own = [] if channels == 48 else [f"detail_channels={channels}"]
        job = jobs(table, "micro", 1, own, [row])[0]
        assert isinstance(job, UpgradeJob)
        assert (job.key, job.stage1_key) == (key, stage1_key)


def test_figures_of_finished_runs_are_found():
    """The files in the repository are those of the tables as they are, on the weights in the repository."""
    assert all(finished(job, RESULTS) for job in jobs("table5", "micro", 1, []))


@pytest.mark.parametrize("changes", [["scale=4", "detail_channels=96"], ["data.enlarge=true"]])
def test_rows_compared_at_another_size_are_measured_anew(changes: list[str]):
    def keys(*overrides: str) -> list[str]:
        return [job.key for job in jobs("tableS2", "micro", 1, list(overrides))]

    assert keys("stage2.lr=0.1")[:4] == keys()[:4]  # enlarged images know no training
    assert not set(keys(*changes)) & set(keys())


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
    monkeypatch.setattr("davae.lab.reproduce.choose.load_scale", lambda name: scale)
    monkeypatch.setattr("davae.lab.reproduce.choose.load_table", lambda name: table)
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

    shutil.rmtree(tiny_scale / "out" / "runs" / todo[0].key)  # the other seed's weights serve
    speed = measure_speed(todo, tiny_scale / "out", results, lambda progress: None)["rows"]
    assert list(speed) == ["full", "no fade", "enlarged"]
    assert {row["tokens"] for row in speed.values()} == {16}
    assert table_rows(todo, results)[0][1:3] == ["tokens", "images/s"]
    for name in ("results", "out"):
        (tiny_scale / name).rename(tiny_scale / f"old-{name}")
    with pytest.raises(RecipeError, match=r"weights of 'full' are not in .*; use the --out"):
        measure_speed(todo, tiny_scale / "out", results, lambda progress: None)


def test_a_new_default_changes_no_hash():
    job = upgrades("table5", 1)[0]
    plain = job.recipe.model_copy(update={"name": "other"})
    assert replace(job, recipe=plain, command="").key == job.key
    longer = job.recipe.model_copy(update={"stage2": job.recipe.stage2.model_copy(update={"max_steps": 7})})
    assert replace(job, recipe=longer).key != job.key


def test_new_weights_of_the_base_make_figures_due_again(tiny_scale: Path, tiny_base: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    before = jobs("tiny", "micro", 1, [f"base.model={copy}"])
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    keys = [job.key for job in before]
    state = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    model_digest.cache_clear()
    after = jobs("tiny", "micro", 1, [f"base.model={copy}"])
    assert all(old != new.key for old, new in zip(keys, after, strict=True))


# -- what a user changes ---------------------------------------------------------------------------------------------


def test_overrides_go_to_the_recipes_that_have_their_section():
    given = ["data.limit=5", "stage1.max_steps=2", "dit.max_steps=3"]
    kinds = {Recipe, BaseRecipe}
    assert overrides_for(Recipe, kinds, given, {}) == ["data.limit=5", "stage1.max_steps=2"]
    assert overrides_for(BaseRecipe, kinds, given, {}) == ["data.limit=5", "dit.max_steps=3"]
    for job in jobs("table2", "micro", 1, [*given, "vae.max_steps=4"]):
        assert isinstance(job, BaseJob)
        assert (job.recipe.data.limit, job.recipe.dit.max_steps) == (5, 3)
        assert job.recipe.vae is None or job.recipe.vae.max_steps == 4  # not for rows without one
        if job.detail is not None:
            assert (job.detail.recipe.data.limit, job.detail.recipe.stage1.max_steps) == (5, 2)


@pytest.mark.parametrize(
    ("table", "override", "rows", "message"),
    [
        ("table2", "dti.max_steps=3", None, "dti: unknown key; did you mean 'dit'?"),
        ("table2", "stage1.max_steps=3", ["SD-VAE-like f4, p = 4"], "stage1: unknown key"),
        ("table3", "dit.max_steps=3", None, "--set dit.max_steps=3: no row of table3 trains what it changes"),
        ("table2", "vae.max_steps=3", ["VA-VAE-like f8, p = 2"], "no row of table2 trains what it changes"),
        ("table2", "vae.lambda_kl=0.1", ["DC-AE-like f16, p = 1"], "vae.lambda_kl is 0.1, and a dc autoencoder"),
        (
            "table4",
            "sampling.steps=50",
            None,
            "--set sampling.steps=50: changes no figure; the scale decides how images",
        ),
        ("table2", "report.dtype=float16", None, "--set report.dtype=float16: changes no figure"),
        ("table1", "dit.max_steps=3", ["DA-VEA"], "table1 has no row 'DA-VEA'; did you mean 'DA-VAE'?"),
    ],
)
def test_overrides_and_rows_that_fit_nothing(table: str, override: str, rows: list[str] | None, message: str):
    with pytest.raises(RecipeError) as caught:
        jobs(table, "micro", 1, [override], rows)
    assert message in str(caught.value)


# -- rows that are not trained ---------------------------------------------------------------------------------------


def test_models_that_are_there_are_drawn_and_timed(
    tiny_scale: Path, tiny_base: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    table = Table.model_validate(
        {
            "title": "Tiny",
            "claim": "none",
            "generation": {"data": str(picture_folder), "num": 4, "steps": 2, "guidance": 1.0, "features": "lite0"},
            "compare_at": 32,
            "micro": [
                {"name": "native", "pipeline": str(tiny_base), "resolution": 32},
                {"name": "enlarged", "pipeline": str(tiny_base), "upscale": "lanczos"},
            ],
        }
    )
    monkeypatch.setattr("davae.lab.reproduce.choose.load_table", lambda name: table)
    results = tiny_scale / "results"
    todo = jobs("tiny", "micro", 2, [])
    assert len({job.key for job in todo}) == 4
    native, enlarged, _, second = (run_job(job, tiny_scale / "out", results, lambda progress: None) for job in todo)
    assert (native["generation"]["resolution"], native["generation"]["compared_at"]) == (32, 32)
    assert (enlarged["generation"]["resolution"], enlarged["generation"]["upscale"]) == (16, "lanczos")
    assert (enlarged["generation"]["seed"], second["generation"]["seed"]) == (0, 1)
    assert enlarged["generation"]["fd_lite0"] != second["generation"]["fd_lite0"]
    assert table_rows(todo, results)[0] == MEASURED_HEADINGS
    speed = measure_speed(todo, tiny_scale / "out", results, lambda progress: None)["rows"]
    assert (speed["native"]["tokens"], speed["enlarged"]["tokens"]) == (64, 16)
    assert speed["native"]["images_per_second"] == pytest.approx(1 / speed["native"]["seconds"])
    assert measure_speed(todo, tiny_scale / "out", results, lambda progress: None)["rows"] == speed  # measured once
    headings, lines = table_rows(todo, results)
    assert headings == ["", "tokens", "images/s", *MEASURED_HEADINGS[1:]]
    assert [line[:2] for line in lines] == [["native", "64"], ["enlarged", "16"]]
    assert "±" in lines[0][3]


@pytest.mark.parametrize("row", ["DA-VAE (shipped upgrade)", "base at 64 px, the upgrade as enlarger"])
def test_weights_of_an_upgrade_are_part_of_the_hash(row: str, monkeypatch: pytest.MonkeyPatch):
    (upgraded,) = jobs("table3", "micro", 1, [], [row])
    assert isinstance(upgraded, DrawnJob)
    asked: list[str | None] = []
    monkeypatch.setattr(job_module, "model_digest", lambda model: asked.append(model) or "WEIGHTS")
    assert upgraded.key
    assert [Path(str(model)).name for model in asked] == ["base", "upgrade"]


def test_an_upgrade_enlarges_what_its_base_drew(tiny_scale: Path, monkeypatch: pytest.MonkeyPatch):
    """Table S2's row: trained with the row of the upgrade itself, one run a seed, and left out of the timing."""
    table = Table.model_validate(
        {
            "title": "Tiny",
            "claim": "none",
            "rows": [
                {"name": "bilinear", "upscale": "bilinear"},
                {"name": "both", "upscale": "upgrade"},
                {"name": "upgraded"},
            ],
        }
    )
    monkeypatch.setattr("davae.lab.reproduce.choose.load_table", lambda name: table)
    two = jobs("tiny", "micro", 2, [])
    assert [(job.row, job.seed) for job in two] == [
        ("bilinear", 0), ("both", 0), ("upgraded", 0), ("both", 1), ("upgraded", 1)
    ]  # fmt: skip
    bilinear, both, upgraded, *_ = two
    assert isinstance(both, EnlargedJob)
    assert both.upgrade is not None
    assert both.upgrade.key == upgraded.key
    assert len({job.key for job in two}) == len(two)
    verb, drawing = both.command.split(" && ")
    assert verb.endswith(" --out runs/tiny/both")
    assert "--compare-at 32 --upscale runs/tiny/both --num 4" in drawing

    told: list[str] = []
    figures = [
        run_job(job, tiny_scale / "out", tiny_scale / "results", lambda progress: told.append(progress.task))
        for job in (bilinear, both, upgraded)
    ]
    assert told.count("stage2") == 4  # one training for both rows
    generation = figures[1]["generation"]
    assert (generation["resolution"], generation["compared_at"], generation["upscale"]) == (16, 32, "upgrade")
    assert generation["fd_lite0"] != figures[0]["generation"]["fd_lite0"]
    timed = [bilinear, both, upgraded]
    speed = measure_speed(timed, tiny_scale / "out", tiny_scale / "results", lambda progress: None)
    assert list(speed["rows"]) == ["bilinear", "upgraded"]
    headings, lines = table_rows(timed, tiny_scale / "results")
    assert [line[headings.index("images/s")] == "-" for line in lines] == [False, True, False]
    assert timed_jobs([both]) == []


def commands_of(text: str) -> list[str]:
    return [command.strip() for command in re.split("\n|&&", text) if command.strip().startswith("davae ")]


def test_commands_of_the_paper_scale_page_are_those_of_the_tables_and_parse():
    page = (ROOT / "docs/paper-scale.md").read_text(encoding="utf-8")
    written = [
        command for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for command in commands_of(block)
    ]
    tables = [name for name in table_names() if not load_table(name).ours]
    assert tables == [name for name in table_names() if name.startswith("table")]
    todo = [job for name in tables for job in jobs(name, "paper", None, [])]
    assert written == [command for job in todo for command in commands_of(job.command)]
    for command in written:
        parse(shlex.split(command)[1:])
    for job in todo:
        assert f", {job.row}\n" in page  # a heading
        assert f"| {job.row} |" in page  # its inputs and cost


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_rows_that_are_plans_are_not_run(name: str, tmp_path: Path):
    for job in jobs(name, "paper", 1, []):
        assert isinstance(job, PlannedJob)
        assert all(command.startswith("davae ") for command in job.command.splitlines())
        with pytest.raises(RecipeError, match="is a plan: run its commands"):
            run_job(job, tmp_path, tmp_path, lambda progress: None)


@pytest.mark.parametrize(
    ("words", "titles"),
    [
        (("table1", "--row", "DiT-XL/2", "--row", "REPA (SiT-XL/2)"), ["# DiT-XL/2", "# REPA (SiT-XL/2)"]),
        (("table5", "--dry-run", "--row", "full"), ["# full, seed 0"]),
    ],
)
def test_the_paper_scale_prints_commands_and_the_page(
    words: tuple[str, ...], titles: list[str], capsys: pytest.CaptureFixture
):
    run_cli("reproduce", *words, "--scale", "paper")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == titles
    assert sum(line.startswith("davae ") for line in lines) == len(lines) - len(titles) - 1
    assert lines[-1].startswith("docs/paper-scale.md lists")


def test_the_dry_run_shows_which_runs_are_done(capsys: pytest.CaptureFixture):
    run_cli("reproduce", "table5", "--dry-run", "--row", "full", "--seeds", "4", "--results", str(RESULTS))
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert titles == [*(f"# full, seed {seed}: done" for seed in range(3)), "# full, seed 3"]


def test_clothing_compares_with_the_images_of_its_trainings():
    job = next(job for job in jobs("tableS2", "clothing", 1, []) if isinstance(job, EnlargedJob))
    assert job.measures["generation"]["held_in"] == job.recipe.data.holdout == 0.1
    assert "--held-in 0.1" in job.command
    measures = jobs("table5", "clothing", 1, [])[0].measures  # type: ignore[attr-defined]
    assert measures["reconstruction"]["held_out"] == 0.1


@pytest.mark.parametrize("name", ["fig3", "figS5", "tableS2a"])
def test_figures_of_clothing_are_drawn_from_images_that_were_held_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[float, bool]] = []

    def drawn(*given: object, num: int, held_out: float) -> Path:
        seen.append((held_out, next(part.enlarge for part in given if isinstance(part, Data))))
        return tmp_path

    for part in ("latents_figure", "sensitivity_figure", "spectra_figure"):
        monkeypatch.setattr(figures_module, part, drawn)
    monkeypatch.setattr(figures_module, "trained_stage1", lambda job, out, observer: out)
    for scale in ("clothing", "micro"):
        figures_module.figure(name, scale, ["data.enlarge=true"], tmp_path, tmp_path, lambda progress: None)
    assert seen == [(0.1, True), (0.0, True)]


def test_settings_of_a_split_reach_both_measurements(
    tiny_scale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, float] = {}

    def generation(*args: object, **options: object) -> dict[str, object]:
        seen["held_in"] = options["held_in"]  # type: ignore[assignment]
        return {}

    def reconstruction(vae: str, data: object, resolution: int, num: int, held_out: float) -> dict[str, object]:
        seen["held_out"] = held_out
        return {}

    monkeypatch.setattr(runs_module, "evaluate_generation", generation)
    monkeypatch.setattr(runs_module, "evaluate_reconstruction", reconstruction)
    chosen = {"data": "here", "num": 4, "steps": 1, "guidance": 1.0, "features": "lite0", "held_in": 0.25}
    runs_module.measured_generation("model", chosen, tmp_path, lambda progress: None, None)
    recipe = jobs("table5", "clothing", 1, [])[0].recipe  # type: ignore[attr-defined]
    runs_module.reconstruction_once(tmp_path / "vae", {"data": "here", "num": 4, "held_out": 0.5}, recipe)
    assert seen == {"held_in": 0.25, "held_out": 0.5}


def test_new_weights_of_an_embedded_model_make_figures_due(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`clothing` is a name, not a path: its weights count all the same."""
    (tmp_path / "model.safetensors").write_bytes(b"old")
    monkeypatch.setattr(job_module, "resolve", lambda name: str(tmp_path) if name == "clothing" else name)
    model_digest.cache_clear()
    before = jobs("tableS2", "clothing", 1, [])[0].key
    (tmp_path / "model.safetensors").write_bytes(b"new")
    model_digest.cache_clear()
    assert jobs("tableS2", "clothing", 1, [])[0].key != before
    model_digest.cache_clear()


def test_images_that_measure_a_row_are_there_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"row 'full', \S+data: data/imagenet/val is not here; put the images"):
        runs_module.check_files(jobs("table5", "paper", 1, []))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["table1"], r"row '.*', recipe\.\S+: benchmarks/weights/imagenette64\S* is not here"),
        (
            ["tableS2", "--scale", "clothing"],
            r"row 'base, bilinear', recipe\.data\.source: \.\./shared/data/\S+ is not here",
        ),
        (["table3"], None),  # all of it is in the package
        (["fig4"], r"row 'full', recipe\.base\.model: benchmarks/weights/imagenette64 is not here"),
    ],
)
def test_a_table_away_from_the_repository_names_what_it_reads(
    words: list[str],
    missing: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    name, scale = words[0], words[-1] if "--scale" in words else "micro"
    if missing is None:
        runs_module.check_files(jobs(name, scale, 1, []))  # type: ignore[arg-type]
        return
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("reproduce", *words)
    assert re.search(missing, " ".join(capsys.readouterr().err.split()))
    assert not list((tmp_path / "alone").iterdir())
