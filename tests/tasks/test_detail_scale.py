"""stage2.detail_scale: the loss weight by group, and the statistics that a run, its pipeline and its exports carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_upgrade_recipe

from davae import LatentLayout
from davae.data.latent_cache.meta import read_meta
from davae.errors import RecipeError
from davae.losses.detail_scale import detail_scale_weight
from davae.losses.flow_matching import FlowMatching
from davae.publish.export import export
from davae.publish.upgrade_file import find_upgrade
from davae.recipes import Recipe, validate
from davae.runs.checks import check_init
from davae.runs.upgrade import Upgrade
from davae.tasks.noising import with_detail_scale

LAYOUT = LatentLayout(2, 4)


def test_only_the_detail_weighs_more():
    t = torch.tensor([0.1, 0.9])
    assert with_detail_scale(None, FlowMatching(), t, LAYOUT, 1.0) is None
    shared = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1)
    assert with_detail_scale(shared, FlowMatching(), t, LAYOUT, 1.0) is shared
    for given in (None, shared):
        weight = with_detail_scale(given, FlowMatching(), t, LAYOUT, 0.5)
        assert weight is not None
        assert weight.shape == (2, 6, 1, 1)
        expected = torch.ones(2, 1, 1, 1) if given is None else given
        z, z_d = LAYOUT.split(weight)
        assert torch.equal(z, expected.expand_as(z))
        level = t.view(2, 1, 1, 1)
        torch.testing.assert_close(
            z_d, (expected * detail_scale_weight(1 - level, level, 0.5, "flow")).expand_as(z_d)
        )


def recipe_of(base: Path, data: Path, **changes: object) -> Recipe:
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(base, data, **changes)}, "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def stds(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "config.json").read_text())["detail_std"], dtype=torch.float64)


def test_a_run_and_what_it_leaves_have_the_scale(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    changes = {"stage1__max_steps": 1, "stage2__max_steps": 2, "stage2__detail_scale": 0.5}
    first, second = tmp_path / "first", tmp_path / "second"
    run = Upgrade(recipe_of(tiny_base, picture_folder, **changes), first, lambda progress: None)
    run.run()
    run.folder.close()
    measured = torch.tensor(read_meta(first / "cache").std[run.layout.base_channels :], dtype=torch.float64)
    for folder in (first / "pipeline" / "vae", first / "vae", find_upgrade(str(first)).vae):
        torch.testing.assert_close(stds(folder), 2 * measured, rtol=1e-5, atol=0)
    # another scale on the same cache: its own DetailVAE, and the first one stays
    changes["stage2__detail_scale"] = 0.25
    other = Upgrade(recipe_of(tiny_base, picture_folder, **changes), second, lambda progress: None, stage1=first)
    other.run()
    other.folder.close()
    for folder in (second / "pipeline" / "vae", find_upgrade(str(second)).vae):
        torch.testing.assert_close(stds(folder), 4 * measured, rtol=1e-5, atol=0)
    torch.testing.assert_close(stds(first / "vae"), 2 * measured, rtol=1e-5, atol=0)
    changes["stage2__detail_scale"] = 1.0
    plain = Upgrade(recipe_of(tiny_base, picture_folder, **changes), tmp_path / "third", lambda _: None, stage1=first)
    torch.testing.assert_close(plain.stage2_vae().statistics.std.flatten()[-8:].double(), measured, rtol=1e-5, atol=0)

    # an upgrade to go on from has its own scale, which its file names
    small = export(first, tmp_path / "small", "upgrade", torch.float16)
    for name, scale, known in ((first, 0.5, 0.5), (small, 1.0, 0.5), (second, 0.5, 0.25)):
        changes["stage2__detail_scale"] = scale
        recipe = recipe_of(tiny_base, picture_folder, **changes).model_copy(update={"init": str(name)})
        if scale == known:
            check_init(recipe, other.base.shapes)
            continue
        message = rf"stage2.detail_scale: {scale}, and init goes on from {name}, .* with {known}; .*_scale={known}"
        with pytest.raises(RecipeError, match=message):
            check_init(recipe, other.base.shapes)
