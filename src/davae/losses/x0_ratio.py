"""Loss weight of the authors' SD3 code: the error of x_0 times min((1 - t) / t, 5)."""

from __future__ import annotations

from torch import Tensor


def x0_ratio_weight(sigma: Tensor, maximum: float) -> Tensor:
    """Return the weight of a squared velocity error that stands for x_0's error times min((1 - sigma)/sigma, maximum).

    Flow matching has x_sigma = (1 - sigma) x_0 + sigma noise and v = noise - x_0, so x_0 = x_sigma - sigma v. A velocity that
    is wrong by e puts x_0 wrong by sigma e, and

        min((1 - sigma)/sigma, maximum) (sigma e)^2 = min(sigma (1 - sigma), maximum sigma^2) e^2.

    `min_snr_weight` clips (1 - sigma)^2/sigma^2 instead: 0.04 against 0.16 here at sigma = 0.8 and a maximum of 5.

    Args:
        sigma: noise level in [0, 1], of any shape.
        maximum: positive; 5 in the authors' configuration.
    """
    return (sigma * (1 - sigma)).minimum(maximum * sigma.square())
