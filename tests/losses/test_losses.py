"""Equations 3-6, 12, 13 against closed forms in float64, and flow matching against diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from davae import LatentLayout, alignment_loss, detail_weight, group_mean, velocity_loss
from davae.losses.flow_matching import interpolate, sample_timesteps, shift_timestep, velocity_target
from davae.losses.perceptual import Lpips, unit, unit_distance
from davae.losses.reconstruction import (
    adaptive_weight,
    discriminator_hinge,
    kl_loss,
    reconstruction_loss,
    with_known_gradient,
)

F64 = torch.float64


def test_group_mean_averages_neighbouring_channels():
    z_d = torch.randn(2, 12, 3, 5, dtype=F64)
    expected = torch.stack([z_d[:, 3 * i : 3 * i + 3].mean(1) for i in range(4)], dim=1)
    torch.testing.assert_close(group_mean(z_d, 4), expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="12 channels, not a multiple of 5"):
        group_mean(z_d, 5)


def test_alignment_loss_value_and_where_its_gradient_goes():
    z = torch.randn(2, 2, 3, 3, dtype=F64, requires_grad=True)
    z_d = torch.randn(2, 6, 3, 3, dtype=F64, requires_grad=True)
    loss = alignment_loss(z_d, z)
    difference = group_mean(z_d, 2) - z
    torch.testing.assert_close(loss, difference.square().mean())
    loss.backward()
    assert z.grad is None
    expected = (2 * difference / difference.numel() / 3).repeat_interleave(3, dim=1)
    torch.testing.assert_close(z_d.grad, expected.detach())


def test_detail_weight_is_the_cosine_of_eq_12():
    assert detail_weight(0, 100) == 0.0
    assert detail_weight(25, 100) == pytest.approx((1 - math.cos(math.pi / 4)) / 2, abs=1e-15)
    assert detail_weight(50, 100) == pytest.approx(0.5, abs=1e-15)
    assert detail_weight(100, 100) == detail_weight(10_000, 100) == detail_weight(0, 0) == 1.0


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_velocity_loss_is_eq_13(weight: float):
    layout = LatentLayout(2, 6)
    prediction, target = torch.randn(2, 3, 8, 4, 5, dtype=F64)
    loss = velocity_loss(prediction, target, layout, weight)
    error = (prediction - target).square()
    per_position = (error[:, :2].sum(1) + weight * error[:, 2:].sum(1)) / (2 + weight * 6)
    torch.testing.assert_close(loss.total, per_position.mean())
    torch.testing.assert_close(loss.base, error[:, :2].mean())
    torch.testing.assert_close(loss.detail, error[:, 2:].mean())


def test_velocity_loss_sums_half_precision_in_float32():
    prediction = torch.full((1, 4, 2, 2), 1e-4, dtype=torch.float16)
    loss = velocity_loss(prediction, torch.zeros_like(prediction), LatentLayout(2, 2), 1.0)
    assert loss.total.dtype == torch.float32
    assert float(loss.total) > 0  # 1e-8 is zero in float16


def test_velocity_loss_refuses_wrong_shapes():
    x = torch.zeros(1, 8, 2, 2)
    with pytest.raises(ValueError, match="differ in shape"):
        velocity_loss(x, x[:, :4], LatentLayout(2, 6), 1.0)
    with pytest.raises(ValueError, match="2 base \\+ 4 detail = 6"):
        velocity_loss(x, x, LatentLayout(2, 4), 1.0)


def test_layout_splits_base_first_and_joins_back():
    layout = LatentLayout(2, 6)
    x = torch.randn(1, 8, 2, 2)
    z, z_d = layout.split(x)
    assert torch.equal(z, x[:, :2])
    assert torch.equal(z_d, x[:, 2:])
    assert torch.equal(layout.join(z, z_d), x)
    assert (layout.channels, layout.group_size) == (8, 3)
    with pytest.raises(ValueError, match="multiple of the base's 4 channels, found 6"):
        LatentLayout(4, 6)


def test_flow_matching_equals_diffusers():
    """x_t as FlowMatchEulerDiscreteScheduler noises it, and its shift as ours."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, noise = torch.randn(2, 4, 3, 2, 2, dtype=F64)
    t = scheduler.timesteps[[10, 200, 500, 990]]
    expected = scheduler.scale_noise(x, t, noise)
    torch.testing.assert_close(interpolate(x, noise, t.double() / 1000), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(velocity_target(x, noise), noise - x)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(shift_timestep(plain.sigmas[:1000], 3.0), scheduler.sigmas[:1000])


def test_timesteps_are_logit_normal():
    t = sample_timesteps(20_000, torch.Generator().manual_seed(0), mean=0.5, std=0.8)
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.02)


def test_kl_of_a_gaussian():
    mean, logvar = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, math.log(4.0)]])
    assert float(kl_loss(mean, logvar)) == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4.0)))


def test_reconstruction_loss_is_float32_under_autocast():
    images = torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen: list[torch.dtype] = []

        class Spy(torch.nn.Module):
            def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                seen.append((a @ b.transpose(-1, -2)).dtype)
                return (a - b).abs().flatten(1).mean(1)

        loss = reconstruction_loss(
            images.bfloat16(),
            images,
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            Spy(),
            lambda_lpips=1,
            lambda_l1=2,
            lambda_kl=3,
        )
    assert seen == [torch.float32]
    torch.testing.assert_close(loss.total, loss.lpips + 2 * loss.l1 + 3 * loss.kl)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    gradients = [torch.autograd.grad(loss, w)[0] for loss in ((3 * w).sum(), (w * w).sum())]
    assert float(adaptive_weight(*gradients)) == pytest.approx((3 * 2**0.5) / (2 * 5**0.5), rel=1e-5)


def test_a_carried_gradient_is_that_of_the_loss_behind_it():
    w = torch.randn(3, dtype=F64, requires_grad=True)
    leaf = (w**3).detach().requires_grad_()
    loss = leaf.sin().sum()
    carried = with_known_gradient(w**3, torch.autograd.grad(loss, leaf)[0], loss)
    assert float(carried) == float(loss)
    (2 * carried).backward()
    torch.testing.assert_close(w.grad, 2 * torch.autograd.grad((w**3).sin().sum(), w)[0])


def test_discriminator_hinge_is_zero_beyond_the_margin():
    assert float(discriminator_hinge(torch.full((2,), 1.5), torch.full((2,), -1.5))) == 0.0
    assert float(discriminator_hinge(torch.zeros(2), torch.zeros(2))) == 1.0


@pytest.mark.parametrize("dead", [False, True])
def test_distances_of_unit_features_have_the_gradient_that_autograd_finds(dead: bool):
    features = torch.randn(2, 5, 3, 4, dtype=F64)
    if dead:
        features[0, :, 1, 2] = 0
    wanted, _ = unit(torch.randn(2, 5, 3, 4, dtype=F64))
    weight, upstream = torch.rand(5, dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)

    def plainly(x: torch.Tensor) -> torch.Tensor:
        x = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        return (weight.view(1, -1, 1, 1) * (x - wanted).square()).sum(1).mean((1, 2))

    for layout in (torch.contiguous_format, torch.channels_last):
        own = features.clone(memory_format=layout).requires_grad_()
        distance = unit_distance(own, wanted.clone(memory_format=layout), weight)
        torch.testing.assert_close(distance, plainly(own))
        found, expected = (torch.autograd.grad(d, own, upstream)[0] for d in (distance, plainly(own)))
        assert found.is_contiguous(memory_format=layout)
        alive = features.abs().sum(1, keepdim=True).expand_as(found) > 0
        torch.testing.assert_close(found[alive], expected[alive])
        assert torch.isfinite(found).all(), "plainly it is not a number where all features are 0"


def test_lpips_is_the_packages_with_its_gradient():
    distance = Lpips("vgg", random=True).double()
    image, target = (torch.rand(2, 3, 32, 48, dtype=F64) * 2 - 1 for _ in range(2))
    image.requires_grad_()
    found, expected = distance(image, target), distance.model(image, target).flatten()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), image)[0] for d in (found, expected)))
