"""stage2.clean_base: samples that keep a clean base, their loss, and what an upgrade remembers of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_transformer
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler
from safetensors import safe_open
from test_stage2_options import flux_task
from upgraded_tiny import assembled, upgraded

import davae
from davae import LatentLayout, expand_transformer, velocity_loss
from davae.backbones.expand import CLEAN_BASE
from davae.backbones.families import denoiser
from davae.backbones.trainable import choose_trainable
from davae.errors import ModelError
from davae.losses.clean_base import mean_base_error, with_clean_base, without_base_error
from davae.losses.velocity import detail_direction_loss
from davae.publish.assemble import apply_upgrade, read_details, save_upgrade
from davae.recipes.sections import Lora, Stage2
from davae.train.random import SampleRandom

LAYOUT = LatentLayout(2, 4)


def test_a_chosen_sample_keeps_its_base_and_has_no_error_there():
    latents, x_t, target, prediction = torch.randn(4, 3, 6, 2, 2)
    prediction.requires_grad_()
    chosen = torch.tensor([True, False, True])
    x = with_clean_base(x_t, latents, LAYOUT, chosen)
    assert torch.equal(x[0, :2], latents[0, :2])
    assert torch.equal(x[:, 2:], x_t[:, 2:])
    assert torch.equal(x[1], x_t[1])
    loss = velocity_loss(prediction, without_base_error(target, prediction, LAYOUT, chosen), LAYOUT, 0.5)
    loss.total.backward()
    assert prediction.grad is not None
    assert bool((prediction.grad[chosen][:, :2] == 0).all())
    assert bool((prediction.grad[~chosen] != 0).all())
    plain = velocity_loss(prediction, target, LAYOUT, 0.5)
    torch.testing.assert_close(loss.detail, plain.detail)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_of_direction_leaves_a_clean_base_alone(weight: float):
    """A longer base would lower the angle, so that nothing bounds it."""
    prediction, target = torch.randn(2, 5, 6, 2, 2)
    prediction.requires_grad_()
    chosen = torch.tensor([True, False, True, False, False])
    own = without_base_error(target, prediction, LAYOUT, chosen)
    term = detail_direction_loss(prediction, own, LAYOUT, weight, chosen)
    (velocity_loss(prediction, own, LAYOUT, weight).total + term).backward()
    assert prediction.grad is not None
    assert bool((prediction.grad[chosen][:, :2] == 0).all())
    assert bool((prediction.grad[~chosen][:, :2] != 0).all())
    # the angle of the detail alone
    detail = detail_direction_loss(
        prediction[:1].detach().index_fill(1, torch.tensor([0, 1]), 0.0),
        target[:1].index_fill(1, torch.tensor([0, 1]), 0.0),
        LAYOUT,
        1.0,
    )
    alone = detail_direction_loss(prediction[:1], own[:1], LAYOUT, 1.0, chosen[:1])
    torch.testing.assert_close(alone, detail)


def test_the_mean_base_error_is_that_of_samples_with_a_base_error():
    errors = torch.tensor([0.0, 2.0, 0.0, 4.0])
    clean = torch.tensor([True, False, True, False])
    assert float(mean_base_error(errors.mean(), clean)) == pytest.approx(3.0)
    assert float(mean_base_error(errors.mean(), None)) == pytest.approx(1.5)
    assert float(mean_base_error(torch.tensor(0.0), torch.tensor([True, True]))) == 0.0


class Seen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, hidden_states, **others):
        self.inputs.append(hidden_states)
        return (torch.zeros_like(hidden_states),)


def loss_of(**settings) -> tuple[torch.Tensor, torch.Tensor]:
    task, _, _ = flux_task(False, **settings)
    task.modules["transformer"] = seen = Seen()
    torch.manual_seed(3)
    batch = {"latents": torch.randn(8, 8, 4, 4), "conditions": ["a"] * 8}
    total, _ = task.loss("transformer", batch, 0, SampleRandom(0, "stage2", 0, 0, 8))
    return total, torch.nn.functional.pixel_shuffle(seen.inputs[0].transpose(1, 2).unflatten(2, (2, 2)), 2)


def test_stage_2_draws_the_share_last_and_nothing_at_zero():
    none, plain = loss_of()
    zero, same = loss_of(clean_base=0.0)
    assert torch.equal(none, zero)
    assert torch.equal(plain, same)
    some, changed = loss_of(clean_base=0.5)
    torch.manual_seed(3)
    z, _ = LatentLayout(4, 4).split(torch.randn(8, 8, 4, 4))
    clean = (changed[:, :4] == z).flatten(1).all(1)
    assert 0 < int(clean.sum()) < 8
    assert torch.equal(changed[~clean], plain[~clean])  # the draws before it stay the same
    assert torch.equal(changed[:, 4:], plain[:, 4:])
    assert float(some) != float(none)


def test_the_share_is_a_share():
    assert "clean_base" not in Stage2(max_steps=1, batch_size=1).model_dump(exclude_defaults=True)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="clean_base"):
            Stage2(max_steps=1, batch_size=1, clean_base=wrong)


def test_an_upgrade_file_remembers_it_and_only_then(tmp_path: Path):
    base, lora, file = tiny_transformer(), Lora(rank=2), tmp_path / "upgrade.safetensors"
    trained = expand_transformer(base, 4)
    choose_trainable(trained, lora)
    save_upgrade(trained, file, lora, torch.float32)
    assert CLEAN_BASE not in apply_upgrade(base, file).config
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    assert "clean_base" not in metadata
    trained.register_to_config(**{CLEAN_BASE: 0.25})
    save_upgrade(trained, file, lora, torch.float32)
    assert apply_upgrade(base, file).config[CLEAN_BASE] == 0.25
    for wrong in ("2.0", '"half"', "[]x"):
        with pytest.raises(ModelError, match="clean_base"):
            read_details(
                file,
                {**metadata, "class": "SD3Transformer2DModel", "channels": json.dumps([4, 8]), "clean_base": wrong},
            )


def test_a_model_trained_for_it_sees_the_clean_base_at_every_step(tiny_base: Path):
    pipeline = assembled(tiny_base)
    denoiser(pipeline).register_to_config(**{CLEAN_BASE: 0.1})
    image = picture(1, 16, 16)
    z = pipeline.vae.encode_base(_tensor(image))
    seen = []
    handle = denoiser(pipeline).register_forward_pre_hook(
        lambda model, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"])[:, :4].clone()),
        with_kwargs=True,
    )
    davae.upscale(pipeline, image, steps=3, guidance_scale=1.0)
    handle.remove()
    assert len(seen) == 3
    for base in seen:
        torch.testing.assert_close(base, z)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, DDIMScheduler])
def test_a_scaled_input_shows_the_clean_base_too(kind: type, tmp_path: Path):
    """Schedulers of x = z + sigma n divide what the model sees by sqrt(1 + sigma^2)."""
    pipeline = upgraded("UNet2DConditionModel", tmp_path)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    denoiser(pipeline).register_to_config(**{CLEAN_BASE: 0.1})
    image, seen = picture(1, 8, 8), []
    denoiser(pipeline).register_forward_pre_hook(
        lambda model, args, kwargs: seen.append((args[0] if args else kwargs["sample"])[:, :4].clone()),
        with_kwargs=True,
    )
    davae.upscale(pipeline, image, steps=3, guidance_scale=1.0, window=16)
    assert len(seen) > 2
    for base in seen:
        torch.testing.assert_close(base, seen[0], rtol=1e-4, atol=1e-5)


def test_a_free_base_follows_its_noisy_path(tiny_base: Path):
    """No model was trained to move a clean base, and a clean base has no noise to move."""
    pipeline = assembled(tiny_base)
    denoiser(pipeline).register_to_config(**{CLEAN_BASE: 0.1})
    image, seen = picture(1, 16, 16), []
    z = pipeline.vae.encode_base(_tensor(image))
    denoiser(pipeline).register_forward_pre_hook(
        lambda model, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"])[:, :4].clone()),
        with_kwargs=True,
    )
    davae.upscale(pipeline, image, steps=4, guidance_scale=1.0, strength=0.5)
    noise = seen[0]  # sigma 1
    for base in seen[1:3]:  # straight from the noise to z
        way = ((base - noise) * (z - noise)).sum() / (z - noise).square().sum()
        torch.testing.assert_close(base, noise + way * (z - noise), rtol=1e-4, atol=1e-4)
        assert 0.05 < float(way) < 0.95


def _tensor(image) -> torch.Tensor:
    from davae.data.images import to_tensor

    return to_tensor(image)[None]
