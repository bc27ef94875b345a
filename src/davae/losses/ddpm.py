"""Diffusion on a table of noise levels: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

t is 0 .. T-1, the last the noisiest, a_t the scheduler's own `alphas_cumprod` (Ho et al., arXiv 2006.11239). A schedule
rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891) ends at 0, and every function here is finite there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["flow", "epsilon", "v_prediction"]


def signal_and_noise(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sqrt(a_t), sqrt(1 - a_t)) at t (B,), (B,1,1,1) in dtype and device of `like`."""
    alpha_bar = alphas_cumprod.to(like)[t.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return x_t, Eq. 4 of arXiv 2006.11239.

    latents, noise (B,c,h,w), alphas_cumprod (T,), t (B,) integers -> (B,c,h,w).
    """
    alpha, sigma = signal_and_noise(alphas_cumprod, t, latents)
    return alpha * latents + sigma * noise


def v_target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 of arXiv 2202.00512, (B,c,h,w)."""
    alpha, sigma = signal_and_noise(alphas_cumprod, t, latents)
    return alpha * noise - sigma * latents


def draw_timesteps(
    batch_size: int, steps: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw (B,) integers uniformly from 0 .. steps-1, Alg. 1 of arXiv 2006.11239."""
    return torch.randint(0, steps, (batch_size,), generator=generator, device=generator.device).to(device)


@dataclass(frozen=True)
class Diffusion:
    """Objective of DDPM: predict the noise, or v, at timesteps uniform over the training steps.

    A model that also returns a variance is trained on its mean alone. The stock pipelines drop the variance before the
    scheduler's step, so a trained variance would change no image. The new rows of that half of the head stay zero, the
    middle of the range in which a learned variance is interpolated.
    """

    alphas_cumprod: Tensor  # (T,)
    prediction: Literal["epsilon", "v_prediction"]

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one timestep from each sample's generator: (B,) integers."""
        steps = len(self.alphas_cumprod)
        return torch.cat([draw_timesteps(1, steps, generator, generator.device) for generator in generators])

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B,c,h,w)."""
        return add_noise(latents, noise, self.alphas_cumprod, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noise or v, (B,c,h,w)."""
        if self.prediction == "epsilon":
            return noise
        return v_target(latents, noise, self.alphas_cumprod, t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(a_t), sqrt(1 - a_t)), each (B,1,1,1): the factors of x_0 and noise in x_t."""
        like = torch.empty(len(t), 1, 1, 1, device=t.device)
        return signal_and_noise(self.alphas_cumprod, t, like)


def min_snr_weight(alpha: Tensor, sigma: Tensor, gamma: float, prediction: PredictionType) -> Tensor:
    """Return the weight of a squared error by which the error of x_0 weighs min(SNR, gamma).

    Min-SNR weighting (Hang et al., arXiv 2303.09556) at x_t = alpha x_0 + sigma noise, SNR = (alpha/sigma)^2. The weight is
    min(SNR, gamma) times the square of how far x_0 moves with the prediction: sigma^2/alpha^2 for epsilon, which gives
    min(1, gamma/SNR), sigma^2 for v, which gives min(SNR, gamma)/(SNR + 1), and sigma^2 for the velocity noise - x_0 of flow
    matching. At alpha = 0 the weight of epsilon is 1, that of the other two 0.

    Args:
        alpha, sigma: of one shape; sigma^2 = 1 - alpha^2 for epsilon and v, sigma = 1 - alpha for flow.
        gamma: positive; 5 in the paper.
        prediction: the quantity that the model predicts.
    """
    signal, clipped = alpha.square(), gamma * sigma.square()
    if prediction == "epsilon":
        return (clipped / signal).clamp(max=1.0)  # sigma > 0, so alpha = 0 gives infinity, clamped to 1
    return signal.minimum(clipped)
