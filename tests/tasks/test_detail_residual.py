"""stage2.detail_residual: what z predicts of z_d, in closed form, and the autoencoders that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_upgrade_recipe

from davae import DetailVAE, LatentLayout
from davae.analyze.sensitivity import reconstructions
from davae.analyze.spectra import _learned_detail, spectra_figure
from davae.data.latent_cache.meta import read_meta
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.residual import RIDGE, fit_detail
from davae.errors import RecipeError
from davae.latent import LatentStatistics, predict_detail
from davae.pretrained.autoencoders import load_detail_vae
from davae.publish.export import export
from davae.publish.upgrade_file import find_upgrade
from davae.recipes import Recipe, validate
from davae.runs.checks import check_init
from davae.runs.statistics import hash_statistics
from davae.runs.upgrade import Upgrade
from davae.train.loop import Progress

LAYOUT = LatentLayout(2, 4)


class Latents:
    """A cache in memory of raw latents (N,c,h,w)."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray]:
        return (self.latents[place[0]].numpy(),)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(kernel: torch.Tensor | None = None) -> LatentStatistics:
    """Statistics of a mean and a std for each channel, far from 0 and 1."""
    return LatentStatistics(drawn(1, 1, 6, 1, 1), 0.5 + drawn(2, 1, 6, 1, 1).abs(), kernel)


# -- the step, in closed form ------------------------------------------------------------------------------------------


def test_a_position_reads_its_neighbours_and_the_border_repeats():
    z, kernel = drawn(3, 1, 2, 4, 5), drawn(4, 4, 2, 3, 3)
    padded = torch.cat([z[..., :1], z, z[..., -1:]], -1)
    padded = torch.cat([padded[..., :1, :], padded, padded[..., -1:, :]], -2)
    for y, x in [(0, 0), (2, 3), (3, 4)]:
        expected = torch.einsum("dcij,cij->d", kernel, padded[0, :, y : y + 3, x : x + 3])
        torch.testing.assert_close(predict_detail(z, kernel)[0, :, y, x], expected)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_step_is_undone_and_leaves_z(size: int):
    raw, kernel = drawn(5, 3, 6, 4, 4), drawn(6, 4, 2, size, size)
    plain, lifted = given(), given(kernel)
    x = lifted.normalise(raw)
    torch.testing.assert_close(lifted.denormalise(x), raw, rtol=0, atol=1e-12)
    z, z_d = LAYOUT.split(x)
    base, detail = LAYOUT.split(plain.normalise(raw))
    assert torch.equal(z, base)
    _, std = LAYOUT.split(plain.std)
    torch.testing.assert_close(z_d, detail - predict_detail(base, kernel) / std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_take_float32_latents(dtype: torch.dtype):
    raw, kernel = drawn(5, 3, 6, 4, 4).float(), drawn(6, 4, 2, 3, 3)
    exact = given(kernel).normalise(raw.double())
    half = given(kernel).to(dtype)
    tolerance = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(half.normalise(raw).double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(half.denormalise(half.normalise(raw)), raw, rtol=0, atol=1e-5)


def test_statistics_of_a_cell_divide_each_position():
    """FLUX.2 normalises the four positions of a cell of 2x2 apart."""
    kernel, raw = drawn(6, 4, 2, 3, 3), drawn(7, 1, 6, 4, 4)
    cells = LatentStatistics(drawn(8, 1, 6, 2, 2), 0.5 + drawn(9, 1, 6, 2, 2).abs(), kernel)
    torch.testing.assert_close(cells.denormalise(cells.normalise(raw)), raw, rtol=0, atol=1e-12)


def test_the_fit_finds_what_made_the_detail():
    kernel = 0.3 * drawn(10, 4, 2, 3, 3)
    statistics = given()
    z = drawn(11, 400, 2, 6, 6)
    noise = 0.1 * drawn(12, 400, 4, 6, 6)
    detail = predict_detail(z, kernel) + noise + 2.0
    base, _ = LAYOUT.split(statistics.denormalise(LAYOUT.join(z, detail)))
    raw = LAYOUT.join(base, detail)
    found = fit_detail(Latents(raw), statistics, LAYOUT)  # type: ignore[arg-type]
    torch.testing.assert_close(found.kernel.double(), kernel, rtol=0, atol=4 * RIDGE)
    torch.testing.assert_close(found.std, torch.full((4,), 0.1).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(found.mean, torch.full((4,), 2.0).double(), rtol=0, atol=5e-3)
    before, after = detail.var((0, 2, 3)), noise.var((0, 2, 3))
    _, std = LAYOUT.split(statistics.std)
    weights = std.flatten() ** -2
    assert found.share == pytest.approx(1 - float((after * weights).sum() / (before * weights).sum()), abs=2e-3)


def test_what_the_fit_leaves_is_standardised_and_uncorrelated_with_z():
    z, hidden = drawn(13, 300, 2, 5, 5), drawn(14, 300, 4, 5, 5)
    detail = hidden * z[:, :1].abs() + F.avg_pool2d(z, 3, 1, 1).repeat(1, 2, 1, 1) - 1.0  # what is left depends on z
    raw = LAYOUT.join(z, detail)
    statistics = LatentStatistics(torch.zeros(1, 6, 1, 1).double(), torch.ones(1, 6, 1, 1).double())
    fit = fit_detail(Latents(raw), statistics, LAYOUT)  # type: ignore[arg-type]
    mean, std = (LAYOUT.join(one.view(1, 2, 1, 1), value.view(1, 4, 1, 1)) for one, value in (
        (torch.zeros(2).double(), fit.mean), (torch.ones(2).double(), fit.std)
    ))  # fmt: skip
    base, z_d = LAYOUT.split(LatentStatistics(mean, std, fit.kernel.double()).normalise(raw))
    torch.testing.assert_close(z_d.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(z_d.var((0, 2, 3)), torch.ones(4).double(), rtol=0, atol=1e-3)
    near = F.unfold(F.pad(base, [1] * 4, mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
    residual = z_d.flatten(2).transpose(1, 2).flatten(0, 1)
    left = (residual.T @ (near - near.mean(0))) / len(near)
    assert float(left.abs().max()) < 2 * RIDGE


# -- a run -------------------------------------------------------------------------------------------------------------


def recipe_of(base: Path, data: Path, **changes: object) -> Recipe:
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(base, data, **changes)}, "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def started(recipe: Recipe, out: Path, stage1: Path | None = None) -> Upgrade:
    return Upgrade(recipe, out, lambda progress: None, stage1=stage1)


CHANGES = {"stage1__max_steps": 1, "stage2__max_steps": 2, "stage2__detail_residual": True}


@pytest.fixture(scope="module")
def finished(tiny_base: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("residual") / "run"
    run = started(recipe_of(tiny_base, picture_folder, **CHANGES), out)
    run.run()
    run.folder.close()
    return out


def same_normalisation(one: DetailVAE, other: DetailVAE) -> bool:
    latents = torch.randn(2, one.layout.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.equal(one.normalise(latents), other.normalise(latents))


def test_a_run_and_what_it_leaves_normalise_alike(finished: Path, tmp_path: Path):
    vae = load_detail_vae(finished / "pipeline" / "vae")
    assert vae.detail_kernel is not None
    export(finished, tmp_path / "small", "upgrade", torch.float32)
    export(finished, tmp_path / "fused", "fused", torch.float32, self_contained=True)
    for folder in (finished / "vae", tmp_path / "fused" / "vae", find_upgrade(str(tmp_path / "small")).vae):
        assert same_normalisation(load_detail_vae(folder), vae)
    assert same_normalisation(DetailVAE.from_pretrained(finished / "pipeline", subfolder="vae"), vae)


def test_spectra_show_what_stage_2_learns(finished: Path, picture_folder: Path, tmp_path: Path):
    vae = load_detail_vae(finished / "vae").double()
    assert vae.detail_kernel is not None
    z, z_d = vae.layout.split(torch.randn(2, vae.layout.channels, 8, 8, dtype=torch.float64))
    mean, std = (vae.layout.split(values)[0] for values in (vae.statistics.mean, vae.statistics.std))
    expected = z_d - predict_detail((z - mean) / std, vae.detail_kernel)
    torch.testing.assert_close(_learned_detail(vae, z, z_d), expected)
    figures = spectra_figure(str(finished / "vae"), str(picture_folder), tmp_path, num=4, held_out=0.0)
    assert "z_d without what z predicts" in json.loads(figures.with_suffix(".json").read_text())["groups"]


def test_what_shows_checkpoints_finds_the_normalisation(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    kinds: list[int | None] = []

    def look(progress: Progress) -> None:
        if progress.task == "stage2":
            kinds.append(load_detail_vae(tmp_path / "run" / "vae").config["detail_kernel_size"])

    run = Upgrade(recipe_of(tiny_base, picture_folder, **CHANGES), tmp_path / "run", look)
    run.run()
    run.folder.close()
    assert kinds == [3, 3]


def test_a_fit_that_rounds_otherwise_is_the_same(finished: Path):
    """A kernel is fitted again at every start, perhaps on another machine."""
    vae, meta = load_detail_vae(finished / "vae"), read_meta(finished / "cache")
    first, alone = hash_statistics(vae, meta), hash_statistics(vae)
    vae.detail_kernel += 1e-8
    assert hash_statistics(vae, meta) == first
    assert hash_statistics(vae) != alone
    vae.set_detail_kernel(None)
    assert hash_statistics(vae, meta) != first


def test_stage_2_trains_on_standard_latents(finished: Path, tiny_base: Path, picture_folder: Path):
    vae = load_detail_vae(finished / "pipeline" / "vae")
    cache = CachedLatents(finished / "cache", "text")
    latents = torch.stack([torch.as_tensor(np.asarray(cache[i, 0][0], np.float32)) for i in range(len(cache))])
    _, z_d = vae.layout.split(vae.normalise(latents))
    torch.testing.assert_close(z_d.mean((0, 2, 3)), torch.zeros(z_d.shape[1]), rtol=0, atol=1e-3)
    # the ridge keeps a few images from being fitted whole
    torch.testing.assert_close(z_d.std((0, 2, 3)), torch.ones(z_d.shape[1]), rtol=0.02, atol=0)
    _, plain = vae.layout.split(torch.tensor(read_meta(finished / "cache").std).view(1, -1, 1, 1))
    assert bool((torch.tensor(vae.config["detail_std"]) <= plain.flatten() * 1.001).all())


def test_it_changes_no_reconstruction(finished: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    changes = {**CHANGES, "stage2__detail_residual": False}
    plain = started(recipe_of(tiny_base, picture_folder, **changes), tmp_path / "plain", finished).stage2_vae()
    assert plain.detail_kernel is None
    residual = load_detail_vae(finished / "pipeline" / "vae")
    with torch.no_grad():
        before, after = (vae.decode(vae.encode(images).latent_dist.mode()).sample for vae in (plain, residual))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


def test_another_stage_2_on_the_same_cache_has_its_own(
    finished: Path, tiny_base: Path, picture_folder: Path, tmp_path: Path
):
    kept = (finished / "vae" / "config.json").read_bytes()
    changes = {**CHANGES, "stage2__detail_scale": 0.5}
    run = started(recipe_of(tiny_base, picture_folder, **changes), tmp_path / "scaled", finished)
    run.run()
    run.folder.close()
    one, half = (load_detail_vae(folder / "pipeline" / "vae") for folder in (finished, tmp_path / "scaled"))
    assert torch.equal(one.detail_kernel, half.detail_kernel)
    torch.testing.assert_close(
        torch.tensor(half.config["detail_std"]), 2 * torch.tensor(one.config["detail_std"]), rtol=1e-6, atol=0
    )
    assert (finished / "vae" / "config.json").read_bytes() == kept


def test_an_upgrade_to_go_on_from_has_its_own(tiny_base: Path, picture_folder: Path, finished: Path, tmp_path: Path):
    export(finished, tmp_path / "small", "upgrade", torch.float32)
    recipe = recipe_of(tiny_base, picture_folder, **CHANGES).model_copy(update={"init": str(tmp_path / "small")})
    run = started(recipe, tmp_path / "on")
    run.run()
    run.folder.close()
    assert same_normalisation(
        load_detail_vae(tmp_path / "on" / "pipeline" / "vae"), load_detail_vae(finished / "vae")
    )
    config = tmp_path / "small" / "vae" / "config.json"
    for own, change, message in (
        (
            False,
            {},
            r"detail_residual: False, and init goes on .*small, which was trained with True; set .*residual=true",
        ),
        (
            True,
            {"detail_kernel_size": None},
            r"detail_residual: True, .* with False; set stage2.detail_residual=false",
        ),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        changed = {"init": recipe.init, "stage2": recipe.stage2.model_copy(update={"detail_residual": own})}
        with pytest.raises(RecipeError, match=message):
            check_init(recipe.model_copy(update=changed), run.base.shapes)


@pytest.mark.parametrize("size", [0, 2, 9, 10**6])
def test_a_kernel_of_another_size_is_refused(finished: Path, size: int):
    config = dict(load_detail_vae(finished / "vae").config)
    with pytest.raises(ValueError, match=rf"detail_kernel_size must be one of .*found {size}"):
        DetailVAE.from_config({**config, "detail_kernel_size": size})


def test_zero_detail_is_what_z_predicts(finished: Path):
    vae = load_detail_vae(finished / "pipeline" / "vae")
    ways = reconstructions(vae, None)
    vae.set_detail_statistics(torch.zeros(8), torch.tensor(vae.config["detail_std"]))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z, z_d = vae.layout.split(vae.encode(images).latent_dist.mode())
        raw, _ = vae.layout.split(vae.denormalise(vae.layout.join(z, z_d)))
        expected = vae.decode_raw(vae.layout.join(raw, predict_detail(z, vae.detail_kernel)))
    torch.testing.assert_close(ways["zero detail"](images), expected, rtol=0, atol=1e-5)
