"""An upgrade of a full fine-tuning whose changes are stored at a low rank or in 8 bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_upgrade_recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import fails, finished, recipe_file, recipe_values, run_cli

from davae.backbones.families import family_by_class
from davae.errors import ModelError
from davae.files.checksums import KEY
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import UPGRADE_FILE, read_details, read_metadata
from davae.publish.changes import (
    DOWN,
    ROUNDED,
    STEPS,
    UP,
    Changes,
    as_changes,
    is_changed,
    projections,
    rounded,
    stored_shapes,
    trained_value,
)
from davae.recipes import Recipe, validate
from davae.runs.upgrade import Upgrade
from davae.train.run_folder import marker

__all__ = ["finished", "recipe_file", "recipe_values"]  # fixtures
SD3 = family_by_class("SD3Transformer2DModel")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rank", "kept"), [(1, 16 / 21), (2, 20 / 21), (3, 1.0)])
def test_the_factors_are_the_nearest_matrix_of_their_rank(rank: int, kept: float):
    """A change of singular values 4, 2 and 1: the rest of the best approximation is known in closed form."""
    left, right = (torch.linalg.qr(drawn(n, 3))[0] for n in (40, 30))
    start, change = drawn(40, 30), left @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ right.T
    stored, note = as_changes({"a.weight": start + change}, {"a.weight": start}, rank, SD3)
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        f"a.weight{UP}": (40, rank),
        f"a.weight{DOWN}": (rank, 30),
    }
    assert note.kept == pytest.approx(kept, abs=1e-5)
    rest = trained_value("a.weight", stored, start) - (start + change)
    assert float(rest.square().sum()) == pytest.approx(21 * (1 - kept), abs=1e-3)


def test_what_the_pretrained_model_lacks_and_what_gets_no_smaller_stays_whole():
    rows = {
        "blocks.0.weight": (40, 30),
        "blocks.0.bias": (40,),
        "small.weight": (4, 4),
        "conv.weight": (8, 4, 3, 3),
        "experts": (2, 40, 30),
        f"{SD3.embedder}.weight": (40, 30),
        f"{SD3.head}.weight": (40, 30),
        "detail_head.linear.directions": (40, 40),
    }
    assert [name for name, shape in rows.items() if is_changed(name, shape, 2, SD3)] == [
        "blocks.0.weight",
        "conv.weight",
    ]
    lightning = family_by_class("LightningDiT")
    assert lightning.detail_time is not None
    assert not is_changed(f"{lightning.detail_time}.weight", (40, 30), 2, lightning)
    assert stored_shapes(rows, None, SD3) == rows
    stored = stored_shapes(rows, Changes(2, 1.0, (0.0,) * 4), SD3)
    factored = {"blocks.0.weight", "conv.weight"}
    assert stored.keys() == rows.keys() - factored | {name + end for name in factored for end in (UP, DOWN)}
    assert (stored[f"conv.weight{UP}"], stored[f"conv.weight{DOWN}"]) == ((8, 2), (2, 36))
    assert not is_changed("a", (40, 30), 18, SD3), "two factors would be larger"


@pytest.mark.parametrize("rank", [2, None])
def test_an_unchanged_weight_has_a_change_of_zero(rank: int | None):
    start = drawn(20, 20)
    stored, note = as_changes({"a": start}, {"a": start}, rank, SD3)
    assert note.kept == 1.0
    assert torch.equal(trained_value("a", stored, start), start)


def test_a_convolution_counts_as_the_matrix_of_its_rows():
    start, change = drawn(8, 4, 3, 3), (drawn(8, 1) @ drawn(1, 36)).view(8, 4, 3, 3)
    stored, note = as_changes({"a": start + change}, {"a": start}, 1, SD3)
    assert note.kept == pytest.approx(1.0)
    torch.testing.assert_close(trained_value("a", stored, start), start + change)


def test_rows_are_rounded_each_by_its_own_largest_value():
    change = torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0], [-1.27e-6, 0.635e-6, 0.0]])
    whole, steps = rounded(change)
    assert whole.tolist() == [[127, -63, 1], [0, 0, 0], [-127, 64, 0]]
    torch.testing.assert_close(steps, torch.tensor([[1.0], [0.0], [1e-8]]))


def test_8_bits_of_normal_values_lose_a_ten_thousandth_at_most():
    start, change = drawn(64, 192), 1e-4 * drawn(192, 64).T
    stored, note = as_changes({"a": start + change}, {"a": start}, None, SD3)
    assert 0.9999 < note.kept < 1
    change = start + change - start  # as float32 holds it
    error = trained_value("a", stored, torch.zeros_like(start)) - change
    assert float(error.square().sum() / change.square().sum()) == pytest.approx(1 - note.kept, rel=1e-2)


def test_projections_survive_half_precision_and_no_other_training():
    weights = [drawn(64, 48), drawn(32, 64)]
    mine, half = projections(weights), projections([weight.half() for weight in weights])
    assert max(abs(a - b) for a, b in zip(mine, half, strict=True)) < 1e-3
    other = projections([weight + 0.3 * drawn(*weight.shape).roll(1) for weight in weights])
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) > 0.01


def test_a_rank_that_saves_nothing_and_a_change_that_overflows_are_refused():
    with pytest.raises(ModelError, match="--rank 20 makes no weight smaller"):
        as_changes({"a": drawn(20, 20)}, {"a": drawn(20, 20)}, 20, SD3)
    huge = {f"a{end}": torch.full((2, 2), 1e25) for end in (UP, DOWN)}
    with pytest.raises(ModelError, match="the change of a is not finite"):
        trained_value("a", huge, torch.zeros(2, 2))


# -- a run -----------------------------------------------------------------------------------------------------------


def trained(recipe: Recipe, out: Path) -> Path:
    run = Upgrade(recipe, out, lambda _: None)
    run.run()
    run.folder.close()
    return out


@pytest.fixture(scope="module")
def full_run(tiny_base: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"stage1__max_steps": 1, "stage2__max_steps": 3, "stage2__lora": None, "stage2__lr": 0.01}
    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder, **changes), "full")
    assert isinstance(recipe, Recipe)
    return trained(recipe, tmp_path_factory.mktemp("full") / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pipeline(str(folder)).transformer.state_dict()


def exported(run: Path, base: Path, out: Path, *size: str) -> Path:
    run_cli("export", str(run), *size, "--dtype", "float32", "--out", str(out / "small"))
    run_cli("apply", str(out / "small"), "--base", str(base), "--dtype", "float32", "--out", str(out / "on"))
    return out


def test_apply_adds_the_changes(full_run: Path, tiny_base: Path, tmp_path: Path):
    """The nearest of that rank to matrices, and other weights as they are."""
    whole = weights(full_run / "pipeline")
    near = weights(exported(full_run, tiny_base, tmp_path, "--rank", "4") / "on")
    metadata = read_metadata(tmp_path / "small" / UPGRADE_FILE)
    note = read_details(tmp_path, metadata).changes
    assert note is not None
    assert note.rank == 4
    assert 0 < note.kept < 1
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert f"at rank 4, which keeps {100 * note.kept:.1f} %" in card
    base = weights(tiny_base)
    with safe_open(tmp_path / "small" / UPGRADE_FILE, framework="pt") as stream:
        factored = [name.removesuffix(UP) for name in stream.keys() if name.endswith(UP)]  # noqa: SIM118
    assert factored
    for name, weight in whole.items():
        if name in factored:
            change = weight - base[name]
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            torch.testing.assert_close(near[name], base[name] + (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(near[name], weight)
    assert any(not torch.equal(near[name], whole[name]) for name in factored)


def test_apply_adds_changes_in_8_bits(full_run: Path, tiny_base: Path, tmp_path: Path):
    """Each value is within half a step of the trained one, and the file is about half of a half-precision one."""
    base, whole = weights(tiny_base), weights(full_run / "pipeline")
    near = weights(exported(full_run, tiny_base, tmp_path, "--bits", "8") / "on")
    metadata = read_metadata(tmp_path / "small" / UPGRADE_FILE)
    note = read_details(tmp_path, metadata).changes
    assert note is not None
    assert note.rank is None
    assert 0.9999 < note.kept < 1
    assert "stored in 8 bits, which keeps 99.99" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    stored = load_file(tmp_path / "small" / UPGRADE_FILE)
    names = [name.removesuffix(ROUNDED) for name in stored if name.endswith(ROUNDED)]
    assert names
    for name, weight in whole.items():
        if name in names:
            change = (weight - base[name]).flatten(1)
            half = change.abs().amax(1) / 127 / 2
            off = (near[name] - weight).flatten(1).abs().amax(1)
            assert bool((off <= half * 1.001 + 1e-7).all()), name
            assert stored[name + ROUNDED].dtype is torch.int8
        else:
            assert torch.equal(near[name], weight), name
    bytes_of = sum(stored[name + ROUNDED].nbytes + stored[name + STEPS].nbytes for name in names)
    assert bytes_of < 0.4 * sum(whole[name].nbytes for name in names)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_steps_of_changes_in_8_bits_keep_their_precision(full_run: Path, tiny_base: Path, tmp_path: Path, dtype: str):
    run_cli("export", str(full_run), "--bits", "8", "--dtype", dtype, "--out", str(tmp_path / "small"))
    stored = load_file(tmp_path / "small" / UPGRADE_FILE)
    kinds = {next((end for end in (ROUNDED, STEPS) if name.endswith(end)), ""): t.dtype for name, t in stored.items()}
    assert kinds == {ROUNDED: torch.int8, STEPS: torch.float32, "": getattr(torch, dtype)}


def test_another_run_goes_on_from_it(full_run: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path):
    small = exported(full_run, tiny_base, tmp_path, "--rank", "4") / "small"
    changes = {"init": str(small), "stage2__lora": None, "stage2__max_steps": 2, "stage2__lr": 1e-12}
    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder, **changes), "more")
    assert isinstance(recipe, Recipe)
    more = weights(trained(recipe, tmp_path / "more") / "pipeline")
    for name, weight in weights(tmp_path / "on").items():
        torch.testing.assert_close(more[name], weight, rtol=1e-4, atol=1e-5)


def test_ranks_that_cannot_be_are_one_line(full_run: Path, finished: Path, tmp_path: Path, capsys):
    line = fails(capsys, "export", str(full_run), "--rank", "4", "--as", "fused", "--out", str(tmp_path / "no"))
    assert "--rank is for an upgrade without its base" in line
    line = fails(capsys, "export", str(full_run), "--bits", "8", "--as", "fused", "--out", str(tmp_path / "no"))
    assert "--bits is for an upgrade without its base" in line
    line = fails(capsys, "export", str(finished), "--rank", "4", "--out", str(tmp_path / "no"))
    assert "trained a LoRA of rank" in line
    line = fails(capsys, "export", str(finished), "--bits", "8", "--out", str(tmp_path / "no"))
    assert "leave --bits out" in line
    line = fails(capsys, "export", str(full_run), "--rank", "400", "--base", "nothing", "--out", str(tmp_path / "no"))
    assert "--rank 400 makes no weight smaller" in line, "found before the base is opened"
    line = fails(capsys, "export", str(full_run), "--bits", "4", "--out", str(tmp_path / "no"))
    assert "--bits 4: changes are stored in 8 bits" in line
    line = fails(capsys, "export", str(full_run), "--bits", "8", "--rank", "4", "--out", str(tmp_path / "no"))
    assert "two ways" in line
    assert not (tmp_path / "no").exists()


def test_another_base_is_noticed(full_run: Path, tiny_base: Path, tmp_path: Path, capsys):
    """One of other shapes is refused by `--rank`; one of other weights is put on with a warning."""
    line = fails(capsys, "export", str(full_run), "--rank", "4", "--base", "clothing", "--out", str(tmp_path / "no"))
    assert "clothing has another model" in line or "has another model; give the run's base" in line
    line = fails(capsys, "export", str(full_run), "--rank", "4", "--base", "micro", "--out", str(tmp_path / "no"))
    assert "does not fit this transformer" in line or "upgrades a" in line
    run_cli("export", str(full_run), "--rank", "4", "--out", str(tmp_path / "small"))
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (weights_file,) = (other / "transformer").glob("*.safetensors")
    mixed = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(weights_file).items()}
    save_file(mixed, weights_file, {"format": "pt"})
    capsys.readouterr()
    run_cli("apply", str(tmp_path / "small"), "--base", str(tiny_base), "--out", str(tmp_path / "right"))
    assert "another base" not in capsys.readouterr().err
    run_cli("apply", str(tmp_path / "small"), "--base", str(other), "--out", str(tmp_path / "wrong"))
    assert "another base's weights" in " ".join(capsys.readouterr().err.split())


def test_a_missing_factor_is_found(full_run: Path, tiny_base: Path, tmp_path: Path, capsys):
    run_cli("export", str(full_run), "--rank", "4", "--out", str(tmp_path / "small"))
    file = tmp_path / "small" / UPGRADE_FILE
    tensors, metadata = load_file(file), read_metadata(file)
    name = next(name for name in tensors if name.endswith(DOWN))
    cut = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(cut, file, {key: value for key, value in metadata.items() if "sum" not in key})
    line = fails(capsys, "apply", str(tmp_path / "small"), "--base", str(tiny_base), "--out", str(tmp_path / "no"))
    assert name in line or "damaged" in line


NOTE = '{"rank": 4, "bits": 8, "kept": 0.9, "base": [0.1, 0.1, 0.1, 0.1]}'


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("low_rank", '{"rank": 0}'),
        ("low_rank", '{"rank": "4"}'),
        ("low_rank", "[4]"),
        ("low_rank", "{}"),
        ("low_rank", '{"rank": 4, "kept": 0.9, "base": [0.1]}'),
        ("rounded", NOTE.replace('"bits": 8', '"bits": 4')),
        ("rounded", NOTE.replace('"bits": 8, ', "")),
        ("rounded", NOTE.replace("0.9", "null")),
    ],
)
def test_a_damaged_note_is_found(full_run: Path, key: str, entry: str):
    metadata = read_metadata(full_run / UPGRADE_FILE)
    with pytest.raises(ModelError, match=key):
        read_details(full_run / UPGRADE_FILE, {**metadata, key: entry})
    with pytest.raises(ModelError, match="two ways"):
        read_details(full_run / UPGRADE_FILE, {**metadata, "low_rank": NOTE, "rounded": NOTE})


def test_a_step_that_is_not_finite_or_a_wrong_kind_of_number_is_found(
    full_run: Path, tiny_base: Path, tmp_path: Path, capsys
):
    run_cli("export", str(full_run), "--bits", "8", "--out", str(tmp_path / "small"))
    file = tmp_path / "small" / UPGRADE_FILE
    metadata = {key: value for key, value in read_metadata(file).items() if key != KEY}  # no checksums
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(STEPS))
    kind = next(name for name in tensors if not name.endswith((STEPS, ROUNDED)))
    for change in ({name: tensors[name] * float("nan")}, {kind: tensors[kind].to(torch.int8)}):
        save_file({**tensors, **change}, file, metadata)
        line = fails(
            capsys, "apply", str(tmp_path / "small"), "--base", str(tiny_base), "--out", str(tmp_path / "no")
        )
        assert "not finite numbers; it is damaged" in line


@pytest.mark.parametrize("size", [("--bits", "8"), ("--rank", "4"), ()])
def test_an_upgrade_file_that_is_cut_off_is_one_line(full_run: Path, tmp_path: Path, capsys, size: tuple[str, ...]):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    file = run / UPGRADE_FILE
    file.write_bytes(file.read_bytes()[:-9])
    line = fails(capsys, "export", str(run), *size, "--out", str(tmp_path / "no"))
    assert "is damaged" in line
    assert not (tmp_path / "no").exists()


def test_a_run_whose_stage_2_began_again_is_not_exported(full_run: Path, tmp_path: Path, capsys):
    """Its upgrade file may be newer than its pipeline, and would be paired with another autoencoder."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    marker(run, "stage2").unlink()
    line = fails(capsys, "export", str(run), "--out", str(tmp_path / "no"))
    assert "is not finished" in line
    shutil.rmtree(run / "checkpoints")  # a folder that was cleaned up
    run_cli("export", str(run), "--out", str(tmp_path / "yes"))
