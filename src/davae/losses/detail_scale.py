"""Detail at a higher noise level than the base, under one schedule: stage 2 sees c z_d."""

from __future__ import annotations

from torch import Tensor

from davae.losses.ddpm import PredictionType


def detail_noise_level(sigma: Tensor, scale: float) -> Tensor:
    """Return the noise level of the detail where the base has `sigma`, for rectified flow.

    The state (1 - sigma) c z_d + sigma n, divided by (1 - sigma) c + sigma, is (1 - sigma_d) z_d + sigma_d n with

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


def detail_scale_weight(alpha: Tensor, sigma: Tensor, scale: float, prediction: PredictionType) -> Tensor:
    """Return the error weight that undoes the smaller loss of a scaled z_d.

    The state is y = c alpha x + sigma n. A model of an unscaled x at the detail's own noise level has the state y / r: its
    factors of data and noise sum to 1 for rectified flow, their squares for epsilon and v, so that

        r = c alpha + sigma,  or  r^2 = (c alpha)^2 + sigma^2.

    Where both models are wrong by the same error of x, a velocity n - c x is wrong by c / sigma times as much, that of the
    unscaled model by r / sigma times. The quotient of the squares is (r / c)^2, and the same for v. The noise that epsilon
    predicts is not scaled: its weight is 1. With it, an error of the detail counts as in a training of an unscaled z_d
    at the detail's noise level.

    Args:
        alpha, sigma: factors of data and noise in x_t, of one shape.
        scale: c, positive; 1 gives a weight of 1.
        prediction: the quantity that the model predicts.

    Returns:
        The weight, of the shape of `alpha`.
    """
    if prediction == "epsilon":
        return alpha.new_ones(alpha.shape)
    if prediction == "flow":
        return (alpha + sigma / scale).square()
    return alpha.square() + (sigma / scale).square()
