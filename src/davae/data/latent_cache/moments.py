"""Mean and covariance of the latents of a cache at one position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from davae.data.latent_cache.read import CachedLatents
from davae.latent import LatentStatistics

MOST_LATENTS = 16_384  # of a larger cache, evenly spread: at 16x16 positions still four million vectors


def spread_latents(cache: CachedLatents, most: int) -> Iterator[Tensor]:
    """Yield up to `most` raw latents of a cache, evenly spread, (1,c,h,w) in float64."""
    for index in np.linspace(0, len(cache) - 1, min(len(cache), most)).round().astype(int):
        yield torch.from_numpy(np.asarray(cache[int(index), 0][0], np.float64))[None]


def latent_moments(cache: CachedLatents, statistics: LatentStatistics) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of normalised latents x (c,h,w) over images and positions.

        m = E[x],    S = E[x x^T] - m m^T,

    summed in float64. All positions count alike.

    Args:
        cache: raw latents, of any sizes.
        statistics: by which stage 2 normalises them.

    Returns:
        m (c,) and S (c,c), in float64.
    """
    statistics = statistics.to(torch.device("cpu"), torch.float64)
    channels, count = statistics.mean.shape[1], 0
    total, products = torch.zeros(channels).double(), torch.zeros(channels, channels).double()
    for raw in spread_latents(cache, MOST_LATENTS):
        x = statistics.normalise(raw)[0].flatten(1)  # (c,h*w)
        total += x.sum(1)
        products += x @ x.T
        count += x.shape[1]
    mean = total / count
    return mean, products / count - mean.outer(mean)
