"""An upgrade of a full fine-tuning whose changes are stored at a low rank."""

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
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import UPGRADE_FILE, read_details, read_metadata
from davae.publish.low_rank import DOWN, UP, factor, is_factored, projections, stored_shapes, trained_value
from davae.recipes import Recipe, validate
from davae.runs.upgrade import Upgrade

__all__ = ["finished", "recipe_file", "recipe_values"]  # fixtures
SD3 = family_by_class("SD3Transformer2DModel")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rank", "kept"), [(1, 16 / 21), (2, 20 / 21), (3, 1.0)])
def test_the_factors_are_the_nearest_matrix_of_their_rank(rank: int, kept: float):
    """A change of singular values 4, 2 and 1: the rest of the best approximation is known in closed form."""
    left, right = (torch.linalg.qr(drawn(n, 3))[0] for n in (40, 30))
    start, change = drawn(40, 30), left @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ right.T
    stored, note = factor({"a.weight": start + change}, {"a.weight": start}, rank, SD3)
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
    assert [name for name, shape in rows.items() if is_factored(name, shape, 2, SD3)] == [
        "blocks.0.weight",
        "conv.weight",
    ]
    lightning = family_by_class("LightningDiT")
    assert lightning.detail_time is not None
    assert not is_factored(f"{lightning.detail_time}.weight", (40, 30), 2, lightning)
    assert stored_shapes(rows, None, SD3) == rows
    stored = stored_shapes(rows, 2, SD3)
    factored = {"blocks.0.weight", "conv.weight"}
    assert stored.keys() == rows.keys() - factored | {name + end for name in factored for end in (UP, DOWN)}
    assert (stored[f"conv.weight{UP}"], stored[f"conv.weight{DOWN}"]) == ((8, 2), (2, 36))
    assert not is_factored("a", (40, 30), 18, SD3), "two factors would be larger"


def test_an_unchanged_weight_has_factors_of_zero():
    start = drawn(20, 20)
    stored, note = factor({"a": start}, {"a": start}, 2, SD3)
    assert note.kept == 1.0
    assert torch.equal(trained_value("a", stored, start), start)


def test_a_convolution_counts_as_the_matrix_of_its_rows():
    start, change = drawn(8, 4, 3, 3), (drawn(8, 1) @ drawn(1, 36)).view(8, 4, 3, 3)
    stored, note = factor({"a": start + change}, {"a": start}, 1, SD3)
    assert note.kept == pytest.approx(1.0)
    torch.testing.assert_close(trained_value("a", stored, start), start + change)


def test_projections_survive_half_precision_and_no_other_training():
    weights = [drawn(64, 48), drawn(32, 64)]
    mine, half = projections(weights), projections([weight.half() for weight in weights])
    assert max(abs(a - b) for a, b in zip(mine, half, strict=True)) < 1e-3
    other = projections([weight + 0.3 * drawn(*weight.shape).roll(1) for weight in weights])
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) > 0.01


def test_a_rank_that_saves_nothing_and_a_change_that_overflows_are_refused():
    with pytest.raises(ModelError, match="--rank 20 makes no weight smaller"):
        factor({"a": drawn(20, 20)}, {"a": drawn(20, 20)}, 20, SD3)
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


def exported(run: Path, base: Path, out: Path, rank: int) -> Path:
    run_cli("export", str(run), "--rank", str(rank), "--dtype", "float32", "--out", str(out / "small"))
    run_cli("apply", str(out / "small"), "--base", str(base), "--dtype", "float32", "--out", str(out / "on"))
    return out


def test_apply_adds_the_changes(full_run: Path, tiny_base: Path, tmp_path: Path):
    """The nearest of that rank to matrices, and other weights as they are."""
    whole = weights(full_run / "pipeline")
    near = weights(exported(full_run, tiny_base, tmp_path, 4) / "on")
    metadata = read_metadata(tmp_path / "small" / UPGRADE_FILE)
    note = read_details(tmp_path, metadata).low_rank
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


def test_another_run_goes_on_from_it(full_run: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path):
    small = exported(full_run, tiny_base, tmp_path, 4) / "small"
    changes = {"init": str(small), "stage2__lora": None, "stage2__max_steps": 2, "stage2__lr": 1e-12}
    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder, **changes), "more")
    assert isinstance(recipe, Recipe)
    more = weights(trained(recipe, tmp_path / "more") / "pipeline")
    for name, weight in weights(tmp_path / "on").items():
        torch.testing.assert_close(more[name], weight, rtol=1e-4, atol=1e-5)


def test_ranks_that_cannot_be_are_one_line(full_run: Path, finished: Path, tmp_path: Path, capsys):
    line = fails(capsys, "export", str(full_run), "--rank", "4", "--as", "fused", "--out", str(tmp_path / "no"))
    assert "--rank is for an upgrade without its base" in line
    line = fails(capsys, "export", str(finished), "--rank", "4", "--out", str(tmp_path / "no"))
    assert "trained a LoRA of rank" in line
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


@pytest.mark.parametrize(
    "entry", ['{"rank": 0}', '{"rank": "4"}', "[4]", "{}", '{"rank": 4, "kept": 0.9, "base": [0.1]}']
)
def test_a_damaged_rank_is_found(full_run: Path, entry: str):
    metadata = read_metadata(full_run / UPGRADE_FILE)
    with pytest.raises(ModelError, match="low_rank"):
        read_details(full_run / UPGRADE_FILE, {**metadata, "low_rank": entry})
