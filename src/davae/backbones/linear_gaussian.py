"""Velocity that a linear Gaussian model of latents predicts, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-4  # below it, a gain of up to 1 / (2 std) would enlarge the rounding of a half-precision state


def velocity_gain(variance: Tensor, sigma: Tensor) -> Tensor:
    """Return the gain from a noised Gaussian coordinate to its expected velocity.

    Rectified flow takes a coordinate x of mean 0 and variance l to y = a x + s n, with a = 1 - s and n standard normal. Its
    velocity v = n - x and y are jointly Gaussian, with

        E[v y] = s - a l   and   E[y^2] = a^2 l + s^2,

    and the conditional expectation of jointly Gaussian variables is linear:

        E[v | y] = (s - a l) / (a^2 l + s^2) y.

    Args:
        variance: l, positive, (c,).
        sigma: s in [0,1], (B,1).

    Returns:
        (B,c).
    """
    alpha = 1 - sigma
    return (sigma - alpha * variance) / (alpha.square() * variance + sigma.square())


def expected_velocity(x_t: Tensor, sigma: Tensor, mean: Tensor, directions: Tensor, variances: Tensor) -> Tensor:
    """Return E[n - x | x_t] where the channels of x at each position are Gaussian.

    Let x have mean m and covariance S = U diag(l) U^T. The state is x_t = a x + s n with a = 1 - s, so that

        U^T (x_t - a m) = a U^T (x - m) + s U^T n.

    The coordinates of U^T (x - m) are independent with variances l, and those of U^T n are standard normal: each coordinate
    is one of `velocity_gain`, g. As n - x = U (U^T n - U^T (x - m)) - m,

        E[n - x | x_t] = U diag(g(l, s)) U^T (x_t - a m) - m,

    and E[x | x_t] = x_t - s E[n - x | x_t] = m + a S (a^2 S + s^2 I)^-1 (x_t - a m).

    Args:
        x_t: noised latents (B,c,h,w).
        sigma: s in [0,1], (B,).
        mean: m (c,).
        directions: U (c,c), one eigenvector a column.
        variances: l (c,), positive.

    Returns:
        (B,c,h,w).
    """
    s = sigma.view(-1, 1)
    centred = x_t.flatten(2) - ((1 - s) * mean).unsqueeze(2)  # (B,c,h*w)
    coordinates = velocity_gain(variances, s).unsqueeze(2) * (directions.T @ centred)
    return (directions @ coordinates - mean.unsqueeze(1)).view_as(x_t)


def expected_velocity_by_channel(
    x_t: Tensor, sigma: Tensor, mean: Tensor, directions: Tensor, variances: Tensor
) -> Tensor:
    """Return E[n - x | x_t] where each channel has its own noise level.

    As in `expected_velocity`, x has mean m and covariance S = U diag(l) U^T. Now s and a = 1 - s are vectors, with
    A = diag(a): the state x_t = A x + diag(s) n is Gaussian, and with y = x_t - A m,

        E[y y^T] = A S A + diag(s^2) = K,    E[(n - x + m) y^T] = diag(s) - S A,

    so that

        E[n - x | x_t] = (diag(s) - S A) K^-1 y - m.

    A group with s = 0 is clean: the others are then predicted from what it is. K has no basis in which it is diagonal at
    every s; it is solved in float64, one matrix a sample.

    Args:
        x_t: noised latents (B,c,h,w).
        sigma: s in [0,1], (B,c).
        mean, directions, variances: as in `expected_velocity`.

    Returns:
        (B,c,h,w).
    """
    wide = torch.float32 if x_t.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    s, mean, directions, variances = (value.to(wide) for value in (sigma, mean, directions, variances))
    alpha, covariance = 1 - s, (directions * variances) @ directions.T
    own = alpha.unsqueeze(2) * covariance * alpha.unsqueeze(1) + s.square().diag_embed()  # K, (B,c,c)
    cross = s.diag_embed() - covariance * alpha.unsqueeze(1)  # diag(s) - S A
    centred = x_t.flatten(2).to(wide) - (alpha * mean).unsqueeze(2)  # (B,c,h*w)
    found = cross @ torch.linalg.solve(own, centred) - mean.unsqueeze(1)
    return found.to(x_t.dtype).view_as(x_t)


def expected_velocity_error(covariance: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean squared error of `expected_velocity`, the least of all linear models.

    For one coordinate of variance l, with a = 1 - s, the variance of v = n - x that y = a x + s n leaves is

        (1 + l) - (s - a l)^2 / (a^2 l + s^2) = l (a + s)^2 / (a^2 l + s^2) = l / (a^2 l + s^2),

    so that the covariance of the error is S (a^2 S + s^2 I)^-1, whose diagonal has the channels.

    Args:
        covariance: S (c,c) of the latents' channels.
        sigma: s in (0,1], (n,).

    Returns:
        (n,c).
    """
    s = sigma.to(covariance).view(-1, 1, 1)
    state = (1 - s).square() * covariance + s.square() * torch.eye(len(covariance)).to(covariance)  # (n,c,c)
    return torch.linalg.solve(state, covariance.expand_as(state)).diagonal(dim1=1, dim2=2)


class LinearGaussian(nn.Module):
    """Velocity noise - data that a linear Gaussian model of latents predicts from x_t.

    Mean, eigenvectors and eigenvalues of the covariance are buffers. They stay in float32 where a model is cast to half
    precision. New ones are those of a standard normal.

    Args:
        channels: c of the latents.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variances", torch.ones(channels))
        self.register_buffer("directions", torch.eye(channels))

    def set_moments(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the mean (c,) and covariance (c,c) of normalised latents, in float64."""
        variances, directions = torch.linalg.eigh(covariance)
        for name, value in (
            ("mean", mean),
            ("variances", variances.clamp(min=SMALLEST_VARIANCE)),
            ("directions", directions),
        ):
            cast(Tensor, getattr(self, name)).copy_(value)

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return E[n - x | x_t] (B,c,h,w) for x_t (B,c,h,w) at noise levels sigma (B,) or (B,c)."""
        own = (cast(Tensor, buffer).to(x_t) for buffer in (self.mean, self.directions, self.variances))
        return (expected_velocity if sigma.ndim == 1 else expected_velocity_by_channel)(x_t, sigma, *own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the buffers, and keep their precision."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self
