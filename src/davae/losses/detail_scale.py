"""Detail at a higher noise level than the base, under one unchanged schedule: z_d is stored c times as small."""

from __future__ import annotations

from torch import Tensor


def detail_noise_level(sigma: Tensor, scale: float) -> Tensor:
    """Return the noise level of the detail where the base has `sigma`, for rectified flow.

    Stage 2 sees c z_d in place of z_d, c = `scale`. The state (1 - sigma) c z_d + sigma n, divided by
    (1 - sigma) c + sigma, is (1 - sigma_d) z_d + sigma_d n with

        sigma_d = sigma / (sigma + c (1 - sigma)) = shift_{1/c}(sigma),

    the shift of `flow_matching.shift_timestep`. With c < 1 the detail is noisier than the base at every step, so that a
    sampler settles the base first. Scheduler and pipeline stay as they are. c = 0.5 is an offset of 0.17 at sigma = 0.5;
    GRACE (arXiv 2610.10524) uses 0.15.

    Args:
        sigma: noise level of the base in [0,1], of any shape.
        scale: c, positive; 1 changes nothing.

    Returns:
        sigma_d, of sigma's shape.
    """
    return sigma / (sigma + scale * (1 - sigma))


def detail_scale_weight(signal: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Return the weight of a squared error of the detail that undoes the smaller loss of a scaled z_d.

    The state is y = c a x + s n, with a and s the factors of data and noise (1 - sigma and sigma for rectified flow). At a
    given error of x, a velocity n - c x is wrong by c / s times as much. A model of unscaled x at the detail's own noise level
    has the state y / r, r = c a + s, the noise factor s / r, and so a velocity wrong by r / s times as much. The quotient of
    the squares is (r / c)^2: 1 where there is no noise, 1/c^2 in pure noise. With it, each error of the detail weighs what it
    weighs in a training of an unscaled z_d at its noise level.

    Args:
        signal, noise: a and s, of any shape.
        scale: c, positive; 1 gives a weight of a + s, which is 1 for rectified flow.

    Returns:
        The weight, of the shape of `signal`.
    """
    return ((scale * signal + noise) / scale).square()
