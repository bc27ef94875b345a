"""Noise on latents, by which a decoder learns to forgive a generator's errors."""

from __future__ import annotations

from torch import Tensor


def noise_latents(latents: Tensor, noise: Tensor, strength: Tensor, tau: float) -> Tensor:
    """Return z + tau u n, with a strength u of each sample's own (arXiv 2510.11690).

    A generator's latents are wrong by an unknown amount. RAE trains its decoder on z + sigma n with a random sigma for each
    sample, so that one decoder serves every amount between none and tau. Here sigma = tau u is uniform in [0, tau), as in
    RAE's code. Given u, the error of a value is normal with standard deviation tau u. Over all u its variance is
    tau^2 E[u^2] = tau^2 / 3.

    Args:
        latents: z, normalised, so that tau means the same in every channel, (B,c,h,w).
        noise: n, standard normal, (B,c,h,w).
        strength: u, uniform in [0,1), (B,).
        tau: the largest standard deviation of the noise; 0 returns z.
    """
    sigma = (tau * strength).to(latents).view(-1, 1, 1, 1)
    return latents + sigma * noise.to(latents)


def replace_detail(z_d: Tensor, noise: Tensor, strength: Tensor, most: float) -> Tensor:
    """Return sqrt(1 - s^2) z_d + s n, with a share s = most u of each sample's own.

    A generator's z_d has the right variance, but agrees with z only in part. Here its correlation with the true z_d is
    sqrt(1 - s^2), and its variance stays: at s = 1 nothing of it is true, and the best decoder is one of z alone.

    Args:
        z_d: normalised (B,D,h,w).
        noise: n, standard normal, (B,D,h,w).
        strength: u, uniform in [0,1), (B,).
        most: the largest share, in [0,1]; 0 returns z_d.
    """
    share = (most * strength).to(z_d).view(-1, 1, 1, 1)
    return (1 - share.square()).sqrt() * z_d + share * noise.to(z_d)
