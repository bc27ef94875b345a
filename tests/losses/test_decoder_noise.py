"""The noise that a decoder learns to forgive: its distribution in each sample, none at tau 0, the same in any split."""

from __future__ import annotations

import pytest
import torch

from davae.losses.decoder_noise import noise_latents, replace_detail
from davae.train.random import SampleRandom

F64 = torch.float64


@pytest.mark.parametrize("tau", [0.2, 0.8])
def test_each_sample_has_one_deviation_and_all_have_a_third_of_tau_squared(tau: float):
    """Given u the error is normal with deviation tau u; over u its variance is tau^2 / 3 and its kurtosis 9/5 * 3."""
    count, values = 4000, 256
    z, noise = torch.randn(count, 4, 8, 8, dtype=F64), torch.randn(count, 4, 8, 8, dtype=F64)
    strength = torch.rand(count, dtype=F64)
    error = (noise_latents(z, noise, strength, tau) - z).flatten(1)
    own = error.square().mean(1).sqrt() / (tau * strength)  # 1 with a deviation of 1 / sqrt(2 values)
    assert float((own - 1).abs().mean()) == pytest.approx((2 / torch.pi) ** 0.5 / (2 * values) ** 0.5, rel=0.05)
    assert float(error.mean(1).abs().max()) < 5 * tau / values**0.5
    assert float(error.square().mean()) == pytest.approx(tau**2 / 3, rel=0.05)
    fourth = float(error.pow(4).mean() / error.square().mean() ** 2)
    assert fourth == pytest.approx(3 * (1 / 5) / (1 / 3) ** 2, rel=0.05), "E[u^4] / E[u^2]^2 of a uniform u"


def test_the_error_is_tau_u_n_exactly():
    z, noise = torch.randn(3, 2, 4, 4, dtype=F64), torch.randn(3, 2, 4, 4, dtype=F64)
    strength = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    found = noise_latents(z, noise, strength, 0.5)
    assert torch.equal(found[0], z[0])
    assert torch.equal(found[1], z[1] + 0.125 * noise[1])
    assert torch.equal(found[2], z[2] + 0.5 * noise[2])
    assert torch.equal(noise_latents(z, noise, strength, 0.0), z), "tau 0 is the identity"
    half = noise_latents(z.half(), noise.float(), strength.float(), 0.5)
    assert half.dtype == torch.float16


def test_a_replaced_detail_keeps_its_variance_and_has_the_correlation_of_its_share():
    z_d, noise = (torch.randn(4000, 2, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for strength, most in ((0.5, 0.8), (1.0, 1.0), (1.0, 0.6)):
        share = strength * most
        found = replace_detail(z_d, noise, torch.full((4000,), strength, dtype=F64), most)
        assert found.var().item() == pytest.approx(1.0, abs=0.01)
        assert (found * z_d).mean().item() == pytest.approx((1 - share**2) ** 0.5, abs=0.01)
        torch.testing.assert_close(found, (1 - share**2) ** 0.5 * z_d + share * noise)
    assert torch.equal(replace_detail(z_d, noise, torch.ones(4000, dtype=F64), 0.0), z_d), "0 is the identity"
    each = replace_detail(z_d[:3], noise[:3], torch.tensor([0.0, 0.5, 1.0], dtype=F64), 1.0)
    assert torch.equal(each[0], z_d[0]), "a share for each sample"
    assert torch.equal(each[2], noise[2])


def test_a_batch_over_several_processes_has_the_same_noise():
    def noised(place: int, count: int) -> torch.Tensor:
        draws = SampleRandom(7, "stage1.polish", 3, place, count)
        noise = draws.normal(6, 2, 2)
        return noise_latents(torch.zeros(count, 6, 2, 2), noise, draws.uniform(), 0.4)

    assert torch.equal(noised(0, 4), torch.cat([noised(0, 1), noised(1, 2), noised(3, 1)]))
