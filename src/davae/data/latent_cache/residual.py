"""The part of a cached detail latent that the base latent predicts, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from davae.data.latent_cache.moments import MOST_LATENTS, spread_latents
from davae.data.latent_cache.read import CachedLatents
from davae.latent import LatentLayout, LatentStatistics

KERNEL = 3  # positions each way of z that predict a position of z_d
RIDGE = 1e-3  # in units of z's variance: keeps directions that the cache hardly has from large weights
MOST_POSITIONS = 2**21  # of a larger cache, evenly spread; a minute of one core


@dataclass(frozen=True)
class DetailFit:
    """Kernel of `predict_detail`, and mean and std of what it leaves of the raw detail.

    Attributes:
        kernel: K (D,C,k,k).
        mean, std: (D,).
        share: of the variance of normalised z_d, the part that K predicts.
    """

    kernel: Tensor
    mean: Tensor
    std: Tensor
    share: float


def fit_detail(cache: CachedLatents, statistics: LatentStatistics, layout: LatentLayout) -> DetailFit:
    """Return the least-squares prediction of z_d from the neighbourhood of z.

    With u the k x k neighbourhood of a position of z, both normalised, and S their covariances over images and positions,

        K = S_du (S_uu + r I)^-1,    cov(z_d - K u) = S_dd - K S_ud - S_du K^T + K S_uu K^T,

    summed in float64.

    Args:
        cache: raw latents, of any sizes.
        statistics: of raw [z, z_d], without a kernel.
        layout: of the latents.
    """
    statistics = statistics.to(torch.device("cpu"), torch.float64)
    size = layout.base_channels * KERNEL**2 + layout.detail_channels
    total, products, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    positions = int(np.prod(np.asarray(cache[0, 0][0]).shape[1:]))
    for raw in spread_latents(cache, min(MOST_LATENTS, max(1, MOST_POSITIONS // positions))):
        z, z_d = layout.split(statistics.normalise(raw))
        margin = [KERNEL // 2] * 4
        near = F.unfold(F.pad(z, margin, mode="replicate"), KERNEL)[0]  # (C*k*k,h*w)
        rows = torch.cat([near, z_d[0].flatten(1)]).float()
        total += rows.double().sum(1)
        products += (rows @ rows.T).double()
        count += rows.shape[1]
    mean = total / count
    return _solve(mean, products / count - mean.outer(mean), statistics, layout)


def _solve(mean: Tensor, covariance: Tensor, statistics: LatentStatistics, layout: LatentLayout) -> DetailFit:
    """Return the fit of `fit_detail` from mean and covariance of [u, z_d]."""
    inputs = len(mean) - layout.detail_channels
    own, cross = covariance[:inputs, :inputs], covariance[inputs:, :inputs]  # S_uu, S_du
    weights = torch.linalg.solve(own + RIDGE * torch.eye(inputs).double(), cross.T).T  # (D,C*k*k)
    before = covariance[inputs:, inputs:].diagonal()
    left = before - 2 * (weights * cross).sum(1) + ((weights @ own) * weights).sum(1)
    _, raw_mean = layout.split(statistics.mean)
    _, raw_std = layout.split(statistics.std)
    scale = raw_std.mean((0, 2, 3))  # (D,): the detail's are equal at all positions of a cell
    kernel = (weights * scale.view(-1, 1)).view(layout.detail_channels, layout.base_channels, KERNEL, KERNEL)
    return DetailFit(
        kernel.float(),
        raw_mean.mean((0, 2, 3)) + scale * (mean[inputs:] - weights @ mean[:inputs]),
        scale * left.clamp(min=0).sqrt(),
        1 - (left.mean() / before.mean()).item(),
    )
