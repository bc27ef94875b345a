"""Two noise levels in one state: GRACE's two clocks, and the flow that they move a Gaussian along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from davae import LatentLayout
from davae.backbones.detail_time import OFFSET
from davae.losses.base_ahead import base_ahead_levels, base_ahead_times
from davae.losses.flow_matching import shift_timestep
from davae.sample.ode import solve_ode, time_grid

U = torch.linspace(0, 1.15, 24, dtype=torch.float64)


def test_the_base_leads_by_the_offset_and_both_end_at_both_ends():
    base, detail = base_ahead_times(U, 0.15)
    torch.testing.assert_close(base, torch.tensor([max(float(u) - 0.15, 0.0) for u in U], dtype=torch.float64))
    torch.testing.assert_close(detail, torch.tensor([min(float(u), 1.0) for u in U], dtype=torch.float64))
    assert (base <= detail).all()
    inner = (U > 0.15) & (U < 1)
    torch.testing.assert_close((detail - base)[inner], torch.full_like(U[inner], 0.15))
    for u, level in ((0.0, 0.0), (1.15, 1.0)):
        assert [float(one) for one in base_ahead_times(torch.tensor(u), 0.15)] == pytest.approx([level, level])


def test_each_level_is_shifted_alone_and_no_offset_is_one_level():
    levels = base_ahead_levels(U, 0.15, 3.0)
    for column, time in zip(levels.T, base_ahead_times(U, 0.15), strict=True):
        torch.testing.assert_close(column, shift_timestep(time, 3.0))
    plain = base_ahead_levels(U.clamp(max=1), 0.0, 3.0)
    assert torch.equal(plain[:, 0], plain[:, 1])
    delta = torch.tensor([0.0, 0.3], dtype=torch.float64)  # one for each sample
    assert base_ahead_levels(1 + delta, delta, 3.0).tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_the_grid_of_a_sampler_mirrors_the_levels(shift: float):
    grid = time_grid(12, shift, 0.15).double()
    levels = base_ahead_levels(torch.linspace(1.15, 0, 12, dtype=torch.float64), 0.15, 1 / shift)  # 1 is noise
    torch.testing.assert_close(grid, 1 - levels, atol=1e-6, rtol=0)
    assert grid[0].tolist() == [0, 0]
    assert grid[-1].tolist() == [1, 1]
    assert (grid[:, 0] >= grid[:, 1]).all()
    assert torch.equal(time_grid(12, shift, 0.0), time_grid(12, shift))


class GaussianVelocity:
    """Exact velocity of [z, z_d] of one channel each with a joint covariance, at two levels.

    x = A x_0 + S n with A = diag(1 - s), S = diag(s); n - x_0 and x are jointly Gaussian with E[(n - x_0) x^T] = S - C A and
    E[x x^T] = A C A + S S.
    """

    def __init__(self, covariance: Tensor, offset: float):
        self.covariance = covariance
        self.config: dict[str, Any] = {
            "num_classes": 1, "prediction_type": "velocity", "detail_channels": 1, OFFSET: offset
        }  # fmt: skip
        self.levels: list[tuple[float, float]] = []

    def __call__(self, x: Tensor, times: Tensor, labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        base, detail = times[0].double().expand(2)
        self.levels.append((1 - float(base), 1 - float(detail)))
        s = torch.diag(1 - torch.stack([base, detail]))
        a = torch.eye(2, dtype=torch.float64) - s
        gain = (s - self.covariance @ a) @ torch.linalg.inv(a @ self.covariance @ a + s @ s)
        return (-torch.einsum("ij,bjhw->bihw", gain, x),)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("offset", [0.15, 0.6])
def test_a_correlated_gaussian_arrives_with_its_covariance(offset: float, solver: str):
    """The flow is linear, x -> M x of unit noise, so that M M^T is the covariance of what is drawn."""
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    model = GaussianVelocity(covariance, offset)
    units = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1)
    labels = torch.zeros(2, dtype=torch.long)
    found = solve_ode(model, units, labels, 2001, solver=solver, timestep_shift=0.7)
    flow = found.view(2, 2).T
    error = {"euler": 6e-3, "heun": 1e-4}[solver]
    torch.testing.assert_close(flow @ flow.T, covariance, atol=error, rtol=0)
    assert all(base <= detail + 1e-6 for base, detail in model.levels)
    # the detail waits while the base begins
    first = solve_ode(model, units, labels, 0, times=time_grid(101, 1.0, offset)[:10])
    assert torch.equal(first[:, 1], units[:, 1])
    assert not torch.equal(first[:, 0], units[:, 0])


def test_values_by_group_are_spread_over_the_channels():
    layout = LatentLayout(2, 4)
    base, detail = torch.rand(2, 3, 1, 1, 1)
    spread = layout.by_group(base, detail)
    assert spread.shape == (3, 6, 1, 1)
    z, z_d = layout.split(spread)
    assert torch.equal(z, base.expand_as(z))
    assert torch.equal(z_d, detail.expand_as(z_d))
