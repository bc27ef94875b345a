"""A smaller detail is a noisier one: levels, and the weight that undoes the smaller loss."""

from __future__ import annotations

import pytest
import torch

from davae.losses.detail_scale import detail_noise_level, detail_scale_weight
from davae.losses.flow_matching import shift_timestep

SIGMA = torch.linspace(0.01, 1, 25, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 2.0])
def test_the_level_has_the_signal_to_noise_ratio_of_the_scaled_detail(scale: float):
    level = detail_noise_level(SIGMA, scale)
    torch.testing.assert_close((1 - level) / level, scale * (1 - SIGMA) / SIGMA)
    torch.testing.assert_close(level, shift_timestep(SIGMA, 1 / scale))
    if scale < 1:
        assert (level[:-1] > SIGMA[:-1]).all()


@pytest.mark.parametrize("scale", [0.5, 0.25, 2.0])
def test_an_error_of_z_d_weighs_as_in_a_training_at_its_own_level(scale: float):
    """Take a model that is wrong by a known error of x and write down both losses."""
    x, noise, error = (torch.randn(25, dtype=torch.float64) for _ in range(3))
    level = detail_noise_level(SIGMA, scale)

    def velocity_error(sigma: torch.Tensor, data: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        state = (1 - sigma) * data + sigma * noise
        predicted_noise = (state - (1 - sigma) * wrong) / sigma  # what a state and a prediction of the data imply
        return (predicted_noise - wrong) - (noise - data)

    ours = velocity_error(SIGMA, scale * x, scale * (x + error))
    plain = velocity_error(level, x, x + error)
    weight = detail_scale_weight(1 - SIGMA, SIGMA, scale, "flow")
    torch.testing.assert_close(weight * ours.square(), plain.square())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_error_of_v_weighs_as_in_a_training_at_its_own_level(scale: float):
    x, noise, error = (torch.randn(25, dtype=torch.float64) for _ in range(3))
    sigma = SIGMA[:-1]
    x, noise, error, alpha = x[:-1], noise[:-1], error[:-1], (1 - sigma.square()).sqrt()
    r = ((scale * alpha).square() + sigma.square()).sqrt()

    def v_error(alpha: torch.Tensor, sigma: torch.Tensor, data: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        predicted_noise = (alpha * data + sigma * noise - alpha * wrong) / sigma
        return (alpha * predicted_noise - sigma * wrong) - (alpha * noise - sigma * data)

    ours = v_error(alpha, sigma, scale * x, scale * (x + error))
    plain = v_error(scale * alpha / r, sigma / r, x, x + error)
    weight = detail_scale_weight(alpha, sigma, scale, "v_prediction")
    torch.testing.assert_close(weight * ours.square(), plain.square())
    assert detail_scale_weight(alpha, sigma, scale, "epsilon").eq(1).all()


def test_a_scale_of_one_changes_nothing():
    assert torch.equal(detail_noise_level(SIGMA, 1.0), SIGMA)
    torch.testing.assert_close(detail_scale_weight(1 - SIGMA, SIGMA, 1.0, "flow"), torch.ones_like(SIGMA))
