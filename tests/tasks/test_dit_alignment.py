"""stage1.dit_alignment: features of the frozen transformer's first blocks, their loss, and what it trains."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import text_inputs, tiny_autoencoder, tiny_transformer, tiny_upgrade_recipe
from safetensors.torch import load_file
from test_lightning_dit import random_model
from test_training import training_records

from davae import DetailVAE
from davae.backbones.families import family_of
from davae.backbones.first_blocks import block_features, first_blocks
from davae.errors import RecipeError
from davae.losses.feature_alignment import feature_alignment_loss, upsampled_tokens
from davae.losses.flow_matching import FlowMatching
from davae.losses.reconstruction import gradient_at
from davae.recipes import Recipe, validate
from davae.recipes.sections import Stage1
from davae.runs.checks import check_recipe
from davae.runs.upgrade import Upgrade
from davae.tasks.base_model import BaseModel
from davae.tasks.dit_alignment import AlignmentAdapter, FrozenFeatures
from davae.tasks.stage1 import Stage1Task
from davae.train.loop import Progress
from davae.train.random import SampleRandom

CPU = torch.device("cpu")


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_blocks_of_one_minus_the_mean_cosine():
    x = torch.randn(2, 5, 8, dtype=torch.float64).float()
    other = torch.cat([x[:, :2], -x[:, 2:]], dim=1)  # cosines 1, 1, -1, -1, -1
    targets = [(3 * x).requires_grad_(), x]
    own = x.clone().requires_grad_()
    loss = feature_alignment_loss([own, other], targets)
    torch.testing.assert_close(loss, torch.tensor(1 + 1 / 5))
    loss.backward()
    assert targets[0].grad is None
    assert own.grad is not None


def test_tokens_are_interpolated_as_an_image_is():
    maps = torch.randn(2, 7, 3, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    raised = upsampled_tokens(tokens, (3, 4), (6, 8))
    expected = F.interpolate(maps, (6, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(raised.transpose(1, 2).unflatten(2, (6, 8)), expected)


# -- the features ----------------------------------------------------------------------------------------------------


def note(outputs: list[Any], block: Any, inputs: Any, output: Any) -> None:
    outputs.append(output)


def test_features_are_those_of_a_whole_pass_and_later_blocks_do_not_run():
    sd3, dit = tiny_transformer().double(), random_model(depth=4)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    options = text_inputs(2)
    for model, run in (
        (sd3, lambda: sd3(hidden_states=x, **options)),
        (dit, lambda: dit(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 2]))),
    ):
        blocks = list(model.get_submodule(family_of(model).blocks).children())  # type: ignore[arg-type]
        outputs: list[Any] = []
        handles = [b.register_forward_hook(partial(note, outputs)) for b in blocks]
        chosen = first_blocks(model, 0.5)
        with torch.no_grad():
            run()
            every = [out[-1] if isinstance(out, tuple) else out for out in outputs]
            outputs.clear()
            found = block_features(chosen, run)
        assert len(chosen) == len(found) == len(outputs) == len(blocks) // 2
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, every, strict=False))
        for handle in handles:
            handle.remove()
        assert not any(block._forward_hooks for block in chosen)
    assert len(first_blocks(dit, 0.25)) == len(first_blocks(dit, 0.01)) == 1


def features_of(model: Any, vae: DetailVAE, depth: float = 0.5) -> FrozenFeatures:
    null = (torch.tensor([5]),)
    return FrozenFeatures(model, family_of(model).require_call(), vae.layout, FlowMatching(), null, depth)


def task_of(**settings: Any) -> Stage1Task:
    torch.manual_seed(0)
    stage = Stage1(
        max_steps=2, batch_size=2, lambda_lpips=0.0, lambda_adv=0.0, dit_alignment=settings or {"depth": 0.5}  # type: ignore[arg-type]
    )  # fmt: skip
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    model = random_model(torch.float32, depth=4)
    assert stage.dit_alignment is not None
    features = features_of(model, vae) if stage.dit_alignment.weight else None
    return Stage1Task(stage, vae, (), CPU, features)  # type: ignore[arg-type]


def batch() -> dict[str, torch.Tensor]:
    return {"images": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1}


def draws() -> SampleRandom:
    return SampleRandom(0, "stage1", 0, 0, 2)


def test_training_starts_from_the_pretrained_features_of_z():
    task = task_of()
    features, adapter = task.features, task.modules["dit_alignment"]
    assert features is not None
    z, z_d = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    full, t = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        targets = features.tokens(full, t)
        found = adapter(features, full, torch.cat([z, z_d], 1), t)
        raised = [upsampled_tokens(tokens, (8, 8), (16, 16)) for tokens in features.tokens(z, t)]
    torch.testing.assert_close(found, feature_alignment_loss(raised, targets))
    assert [tokens.shape for tokens in targets] == [(2, 256, 32)] * 2
    model: Any = features.transformer
    assert not model.x_embedder.proj._forward_hooks


def test_what_is_trained():
    task = task_of()
    assert task.trainables_at(0) == ["vae", "dit_alignment"]
    adapter = task.trainables["dit_alignment"]
    assert set(adapter.trained) == {
        "entry.weight",
        *(f"projections.{layer}.{n}.{part}" for layer in range(2) for n in (0, 2) for part in ("weight", "bias")),
    }
    assert adapter.lr == 1e-4
    assert not adapter.ema
    assert task.trainables["vae"].trained == task_of(weight=0.0).trainables["vae"].trained
    assert task.features is not None
    assert not any(p.requires_grad for p in task.features.transformer.parameters())


def moved(task: Stage1Task) -> AlignmentAdapter:
    adapter: Any = task.modules["dit_alignment"]
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def test_the_gradient_reaches_the_encoder_and_then_the_adapter_alone():
    """Both equal those of one graph through everything."""
    task, apart = task_of(weighting="constant", weight=0.7), task_of(weight=0.0)
    adapter = moved(task)
    total, logged = task.loss("vae", batch(), 0, draws())
    total.backward()
    plain, _ = apart.loss("vae", batch(), 0, draws())
    plain.backward()
    torch.testing.assert_close(total.detach(), plain.detach() + 0.7 * logged["dit_align"])
    assert task.features is not None
    assert all(p.grad is None for p in [*adapter.parameters(), *task.features.transformer.parameters()])
    reached = {
        name
        for (name, mine), theirs in zip(task.vae.named_parameters(), apart.vae.parameters(), strict=True)
        if mine.grad is not None and not torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    }
    assert reached
    assert all(name.startswith("detail_encoder.") for name in reached)

    # one graph: the same draws, the loss written down
    again = draws()
    again.normal(8, 8, 8)
    again.uniform()
    vae, images = task.vae, batch()["images"]
    raw = vae.encode_raw(images)
    latents = vae.normalise(vae.layout.join(raw.z, raw.mean))
    whole = task.features.loss(adapter, vae.encode_base(images), latents, again)
    torch.testing.assert_close(whole.detach(), logged["dit_align"])
    encoder = vae.last_encoder_weight
    expected = torch.autograd.grad(0.7 * whole, [encoder, *adapter.parameters()])
    theirs = dict(apart.vae.named_parameters())
    name = next(name for name, p in vae.named_parameters() if p is encoder)
    torch.testing.assert_close(encoder.grad - theirs[name].grad, expected[0], atol=1e-5, rtol=1e-3)  # type: ignore[operator]

    before = {n: p.grad.clone() for n, p in vae.named_parameters() if p.grad is not None}
    own, nothing = task.loss("dit_alignment", batch(), 0, draws())
    own.backward()
    assert not nothing
    for parameter, gradient in zip(adapter.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(0.7 * parameter.grad, gradient, atol=1e-6, rtol=1e-3)  # type: ignore[operator]
    assert all(torch.equal(p.grad, before[n]) for n, p in vae.named_parameters() if p.grad is not None)


def test_the_adaptive_weight_makes_both_gradients_equally_large():
    task = task_of(weight=0.5)
    moved(task)
    seen: dict[str, Any] = {}
    score = task.score_features

    def watched(images: Any, z: Any, mean: Any, last: Any, above: Any, draws: Any) -> Any:
        term, logged = score(images, z, mean, last, above, draws)
        seen["norms"] = above.norm(), gradient_at(term, task.vae.last_encoder_weight, torch.ones(())).norm()
        return term, logged

    task.score_features = watched  # type: ignore[method-assign]
    _, logged = task.loss("vae", batch(), 0, draws())
    above, term = seen["norms"]
    torch.testing.assert_close(term, 0.5 * above, rtol=1e-3, atol=0)
    assert float(logged["dit_align_weight"]) > 0


def test_a_weight_of_zero_is_today_s_step_to_the_bit():
    task = task_of(weight=0.0)
    torch.manual_seed(0)
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    none = Stage1(max_steps=2, batch_size=2, lambda_lpips=0.0, lambda_adv=0.0)
    plain = Stage1Task(none, vae, (), CPU)  # type: ignore[arg-type]
    (first, logged), (second, same) = (one.loss("vae", batch(), 0, draws()) for one in (task, plain))
    assert torch.equal(first, second)
    assert logged.keys() == same.keys()
    assert task.trainables_at(0) == plain.trainables_at(0) == ["vae"]


# -- recipes, plans, runs --------------------------------------------------------------------------------------------


def recipe_of(base: Path, data: Path, **changes: object) -> Recipe:
    recipe = validate({"kind": "upgrade", **tiny_upgrade_recipe(base, data, **changes)}, "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def test_mistakes_are_one_line(tiny_base: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="dit_alignment compares whole images, and crop cuts squares"):
        Stage1(max_steps=1, batch_size=1, crop=16, dit_alignment={})  # type: ignore[arg-type]
    recipe = recipe_of(tiny_base, picture_folder, stage1__dit_alignment={})
    base = BaseModel.of(recipe)
    check_recipe(recipe, base)
    monkeypatch.setitem(base.shapes.transformer_config, "pos_embed_max_size", 6)
    with pytest.raises(
        RecipeError, match=r"whole image; 32 pixels are 8 tokens in a row, .* positions up to 6; leave"
    ):
        check_recipe(recipe, base)
    other = BaseModel.of(recipe)
    vars(other)["family"] = replace(other.family, blocks=None)
    with pytest.raises(RecipeError, match=r"reads no features of a SD3Transformer2DModel; .* or use one of SD3"):
        check_recipe(recipe, other)


def test_the_plan_counts_the_frozen_transformer_and_its_passes(tiny_base: Path, picture_folder: Path):
    from davae.cost.memory import stage1_memory
    from davae.pretrained.shapes import read_shapes

    shapes, steps = read_shapes(str(tiny_base)), []
    for alignment in (None, {"weight": 0.0}, {}):
        settings = recipe_of(tiny_base, picture_folder, stage1__dit_alignment=alignment).stage1
        steps.append(stage1_memory(shapes, 8, 2, 32, settings, mixed=False))
    without, zero, aligned = steps
    assert without == zero
    assert aligned.weights > without.weights
    assert aligned.flops > without.flops
    assert aligned.activations >= without.activations  # the perceptual network's are larger in so small a model
    assert 0 < aligned.gradients - without.gradients < 40_000  # the adapter's
    assert aligned.ema == without.ema


def test_an_interrupted_run_goes_on_to_the_bit(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    recipe = recipe_of(tiny_base, picture_folder, stage1__dit_alignment={"depth": 0.5}, stage1__max_steps=3)

    def stop(progress: Progress) -> None:
        if progress.task == "stage1" and progress.step >= 2:
            raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = Upgrade(recipe, whole, lambda progress: None)
    run.train_vae()
    run.folder.close()
    broken = Upgrade(recipe, parts, stop)
    with pytest.raises(KeyboardInterrupt):
        broken.train_vae()
    broken.folder.close()
    again = Upgrade(recipe, parts, lambda progress: None)
    again.train_vae()
    again.folder.close()
    records = training_records(whole)
    assert training_records(parts) == records
    assert all({"dit_align", "dit_align_weight", "grad_norm_dit_alignment"} <= record.keys() for record in records)
    mine, theirs = (load_file(f / "vae" / "diffusion_pytorch_model.safetensors") for f in (parts, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not any("entry" in name or "projections" in name for name in theirs)
