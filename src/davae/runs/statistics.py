"""Statistics of the latent cache, by which a run's DetailVAE normalises its latents."""

from __future__ import annotations

import logging

import torch

from davae.data.latent_cache.key import hash_values
from davae.data.latent_cache.meta import CacheMeta
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.residual import KERNEL, RIDGE, DetailFit, fit_detail
from davae.vae.detail_vae import DetailVAE

logger = logging.getLogger(__name__)


def set_statistics(vae: DetailVAE, meta: CacheMeta, scale: float = 1.0) -> None:
    """Normalise by the statistics of the cached detail, to a std of `scale`."""
    mean, std = torch.tensor(meta.mean).view(1, -1, 1, 1), torch.tensor(meta.std).view(1, -1, 1, 1)
    vae.set_detail_kernel(None)
    vae.set_detail_statistics(vae.layout.split(mean)[1].flatten(), vae.layout.split(std)[1].flatten() / scale)


def hash_statistics(vae: DetailVAE, meta: CacheMeta | None = None) -> str:
    """Return a hash of the statistics that a DetailVAE normalises by.

    Args:
        vae: the DetailVAE.
        meta: of the cache from which its kernel was fitted. What the fit reads is then hashed in the kernel's place, as
            another machine may round the fit otherwise. None where the kernel came with the weights.
    """
    if vae.detail_kernel is not None and meta is not None:
        return hash_values("detail_residual", KERNEL, RIDGE, list(meta.mean), list(meta.std))
    values = [vae.mean, vae.std, *([] if vae.detail_kernel is None else [vae.detail_kernel])]
    return hash_values([hash_values(value.flatten().tolist()) for value in values])


def fit_residual(vae: DetailVAE, cache: CachedLatents, meta: CacheMeta) -> DetailFit:
    """Return what of the cached detail the base latent predicts, and log how much.

    Args:
        vae: the trained DetailVAE; its statistics are set to the cache's.
        cache, meta: of its latents.
    """
    set_statistics(vae, meta)
    fit = fit_detail(cache, vae.statistics, vae.layout)
    logger.info(
        "stage2.detail_residual: z predicts %.0f %% of the detail's variance; stage 2 learns the rest",
        100 * fit.share,
    )
    return fit


def set_residual(vae: DetailVAE, fit: DetailFit, scale: float) -> None:
    """Make a DetailVAE's z_d what the fit does not predict, normalised to a std of `scale`."""
    vae.set_detail_kernel(fit.kernel)
    vae.set_detail_statistics(fit.mean, fit.std / scale)
