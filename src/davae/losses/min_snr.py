"""Min-SNR weighting (Hang et al., arXiv 2303.09556): no noise level counts more than its signal-to-noise ratio allows."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["flow", "epsilon", "v_prediction"]


def min_snr_weight(alpha: Tensor, sigma: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weight of a squared prediction error at x_t = alpha x_0 + sigma noise, so that the error of x_0 weighs min(SNR, gamma).

    With SNR = (alpha/sigma)^2 that is min(SNR, gamma) times how far x_0 moves with the prediction, squared:
    sigma^2/alpha^2 for epsilon, which gives min(1, gamma/SNR); sigma^2 for v, which gives min(SNR, gamma)/(SNR + 1); and
    sigma^2 for the velocity noise - x_0 of flow matching. At alpha = 0 epsilon weighs 1, the other two 0.

    Args:
        alpha, sigma: of one shape; sigma^2 = 1 - alpha^2 for epsilon and v, sigma = 1 - alpha for flow.
        gamma: positive; 5 in the paper.
    """
    signal, clipped = alpha.square(), gamma * sigma.square()
    if prediction == "epsilon":
        return (clipped / signal).clamp(max=1.0)  # sigma > 0, so alpha = 0 gives infinity, clamped to 1
    return signal.minimum(clipped)
