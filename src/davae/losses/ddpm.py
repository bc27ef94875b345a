"""Diffusion with a table of noise levels: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, t = 0 .. T-1, the last the noisiest.

a_t is the scheduler's own `alphas_cumprod` (Ho et al., arXiv 2006.11239); a schedule rescaled to zero terminal SNR
(Lin et al., arXiv 2305.08891) ends at 0, and everything here is finite there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signal_and_noise(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(a_t), sqrt(1 - a_t)) at integer timesteps t (B,), each (B,1,1,1) in the dtype and on the device of `like`."""
    alpha_bar = alphas_cumprod.to(like)[t.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """x_t of Eq. 4 of arXiv 2006.11239. latents, noise (B,c,h,w); alphas_cumprod (T,); t (B,) integers -> (B,c,h,w)."""
    alpha, sigma = signal_and_noise(alphas_cumprod, t, latents)
    return alpha * latents + sigma * noise


def v_target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho, arXiv 2202.00512), (B,c,h,w)."""
    alpha, sigma = signal_and_noise(alphas_cumprod, t, latents)
    return alpha * noise - sigma * latents


def draw_timesteps(
    batch_size: int, steps: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform over 0 .. steps-1 (Alg. 1 of arXiv 2006.11239), (B,) integers, drawn on the generator's device."""
    return torch.randint(0, steps, (batch_size,), generator=generator, device=generator.device).to(device)
