"""The polish's task: what it trains, its losses, its draws; and its settings in a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_autoencoder

from davae import DetailVAE
from davae.cost.flops import meta_detail_vae
from davae.cost.memory import polish_memory, stage1_memory
from davae.errors import RecipeError
from davae.losses.decoder_noise import noise_latents, replace_detail
from davae.plan.expected import expect
from davae.pretrained.shapes import read_shapes
from davae.recipes import Recipe, load_recipe
from davae.recipes.loading import differences
from davae.recipes.sections import Stage1
from davae.recipes.stages import Polish
from davae.tasks.polish import PolishTask
from davae.train.random import SampleRandom
from davae.zoo import resolve

CPU = torch.device("cpu")
POLISH_KEYS = ("noise", "detail_noise", "gan_start")


def settings(**changes: Any) -> Stage1:
    polish = {"max_steps": 3, **{name: changes.pop(name) for name in POLISH_KEYS if name in changes}}
    values = {"max_steps": 9, "batch_size": 4, "lambda_lpips": 0.0, "gan_channels": 8, "gan_layers": 1, **changes}
    return Stage1(**values, polish=Polish(**polish)).polishing


def task_of(**changes: Any) -> PolishTask:
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    vae.set_detail_statistics(torch.linspace(-1, 1, 8), torch.linspace(0.5, 4, 8))
    return PolishTask(settings(**changes), vae, [], CPU)  # type: ignore[arg-type]


def loss_of(task: PolishTask, images: torch.Tensor, place: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    return task.loss("vae", {"images": images}, 0, SampleRandom(0, task.name, 0, place, len(images)))


def test_exactly_the_decoder_is_trained():
    task = task_of()
    decoder = {f"decoder.{name}" for name, _ in task.vae.decoder.named_parameters()}
    assert set(task.trainables["vae"].trained) == decoder
    (group,) = task.trainables["vae"].groups
    assert {id(p) for p in group["params"]} == {id(p) for p in task.vae.decoder.parameters()}
    total, logged = loss_of(task, torch.rand(2, 3, 32, 32) * 2 - 1)
    total.backward()
    with_gradient = {name for name, p in task.vae.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient
    assert with_gradient <= decoder
    assert {"l1", "lpips", "adversarial"} <= logged.keys()
    assert not {"kl", "align"} & logged.keys()
    assert task.trainables_at(0) == ["vae", "discriminator"], "the decoder is good already: from the first step"
    assert task_of(gan_start=5).trainables_at(3) == ["vae"]
    assert task_of(lambda_adv=0.0).trainables_at(9) == ["vae"]


def test_a_polish_may_weigh_its_discriminator_otherwise_than_stage_1():
    stage1 = {"max_steps": 9, "batch_size": 4, "lambda_adv": 0.0, "gan_lr": 1e-4}
    own = Stage1(**stage1, polish=Polish(max_steps=3, lambda_adv=0.5, gan_lr=4e-4)).polishing
    assert (own.lambda_adv, own.gan_lr, own.gan_start) == (0.5, 4e-4, 0)
    as_stage1 = Stage1(**stage1, polish=Polish(max_steps=3)).polishing
    assert (as_stage1.lambda_adv, as_stage1.gan_lr) == (0.0, 1e-4)
    off = Stage1(**{**stage1, "lambda_adv": 0.1}, polish=Polish(max_steps=3, lambda_adv=0.0)).polishing
    assert off.lambda_adv == 0.0


def test_the_decoder_sees_the_mean_latents_with_noise_in_units_of_each_channel():
    task, images = task_of(noise=0.4), torch.rand(3, 3, 32, 32) * 2 - 1
    seen: list[torch.Tensor] = []
    decode = task.vae.decode_raw
    task.vae.decode_raw = lambda latents: (seen.append(latents), decode(latents))[1]  # type: ignore[method-assign]
    loss_of(task, images)
    raw = task.vae.encode_raw(images)
    clean = task.vae.normalise(task.vae.layout.join(raw.z, raw.mean))
    draws = SampleRandom(0, "stage1.polish", 0, 0, 3)
    noise, strength = draws.normal(12, 8, 8), draws.uniform()
    expected = noise_latents(clean, noise, strength, 0.4)
    torch.testing.assert_close(task.vae.normalise(seen[0]), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, clean, atol=1e-2)
    seen.clear()
    plain = task.reconstruct(images)
    torch.testing.assert_close(plain, decode(task.vae.layout.join(raw.z, raw.mean)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_noise_takes_the_place_of_a_share_of_the_detail_alone(residual: bool):
    task, images = task_of(noise=0.0, detail_noise=0.8), torch.rand(3, 3, 32, 32) * 2 - 1
    if residual:  # of what stage 2 learns
        task.vae.set_detail_kernel(torch.randn(8, 4, 3, 3) * 0.1)
    seen: list[torch.Tensor] = []
    decode = task.vae.decode_raw
    task.vae.decode_raw = lambda latents: (seen.append(latents), decode(latents))[1]  # type: ignore[method-assign]
    loss_of(task, images)
    raw = task.vae.encode_raw(images)
    z, z_d = task.vae.layout.split(task.vae.normalise(task.vae.layout.join(raw.z, raw.mean)))
    draws = SampleRandom(0, "stage1.polish", 0, 0, 3)
    draws.normal(12, 8, 8), draws.uniform()
    found, found_d = task.vae.layout.split(task.vae.normalise(seen[0]))
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    expected = replace_detail(z_d, draws.normal(8, 8, 8), draws.uniform(), 0.8)
    torch.testing.assert_close(found_d, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found_d, z_d, atol=1e-2)
    plain = task.reconstruct(images)
    torch.testing.assert_close(plain, decode(task.vae.layout.join(raw.z, raw.mean)), rtol=1e-4, atol=1e-4)


def test_the_noise_of_a_batch_does_not_depend_on_its_split():
    task, images = task_of(lambda_adv=0.0), torch.rand(4, 3, 32, 32) * 2 - 1
    whole = loss_of(task, images)[0]
    parts = [loss_of(task, images[place : place + 2], place)[0] for place in (0, 2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_what_a_polish_does_not_set_is_stage_1_s():
    recipe = load_recipe("micro", ["stage1.polish.max_steps=7", "stage1.batch_size=6", "stage1.lr=0.003"])
    assert isinstance(recipe, Recipe)
    own = recipe.stage1.polishing
    assert own == recipe.stage1.model_copy(
        update={"max_steps": 7, "gan_start": 0, "lr_warmup_steps": 0, "batch_size": 6, "lr": 0.003}
    )
    assert list(recipe.trainings) == ["stage1", "stage1.polish", "stage2"]
    other = load_recipe("micro", ["stage1.polish={max_steps: 7, lr: 0.001, batch_size: 2, lr_schedule: cosine}"])
    assert isinstance(other, Recipe)
    found = other.stage1.polishing
    assert (found.lr, found.batch_size, found.lr_schedule) == (0.001, 2, "cosine")
    assert other.stage1.lambda_l1 == found.lambda_l1
    with pytest.raises(RecipeError, match=r"stage1.polish.tau: unknown key"):
        load_recipe("micro", ["stage1.polish={max_steps: 7, tau: 1}"])
    with pytest.raises(RecipeError, match=r"stage1.polish.noise"):
        load_recipe("micro", ["stage1.polish={max_steps: 7, noise: -1}"])


def test_a_polish_may_be_added_lengthened_and_nothing_else():
    plain, short, long, strong = (
        load_recipe("micro", [f"stage1.polish={value}"])
        for value in ("null", "{max_steps: 3}", "{max_steps: 9}", "{max_steps: 3, noise: 0.8}")
    )
    assert differences(plain, short) == differences(plain, strong) == differences(short, long) == []
    assert differences(short, strong) == ["stage1.polish.noise: 0.4 -> 0.8"]
    (left_out,) = differences(short, plain)
    assert (
        left_out == "stage1.polish: max_steps=3, noise=0.4, detail_noise=0.0, lr_warmup_steps=0, gan_start=0 -> None"
    )


def test_plans_count_the_decoder_alone():
    shapes, chosen = read_shapes(resolve("micro")), settings(lambda_adv=0.0)
    polish, stage1 = (work(shapes, 16, 2, 32, chosen, mixed=False) for work in (polish_memory, stage1_memory))
    vae = meta_detail_vae(shapes, 16, 2)
    decoder = sum(parameter.numel() for parameter in vae.decoder.parameters())
    assert polish.gradients == polish.ema == 4 * decoder < stage1.gradients
    assert polish.activations < stage1.activations
    assert polish.flops < stage1.flops
    recipe = load_recipe("micro", ["stage1.max_steps=100", "stage1.polish.max_steps=200"])
    assert isinstance(recipe, Recipe)
    seconds = expect(recipe, shapes, 1e9).seconds
    assert list(seconds) == ["stage1", "stage1.polish", "stage2"]
    assert 1 < seconds["stage1.polish"] / seconds["stage1"] < 2, "twice the steps, each with less work"
