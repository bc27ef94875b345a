"""Statistics of the latent cache, by which a run's DetailVAE normalises its latents."""

from __future__ import annotations

import torch

from davae.data.latent_cache.key import hash_values
from davae.data.latent_cache.meta import CacheMeta
from davae.data.latent_cache.residual import DetailFit
from davae.vae.detail_vae import DetailVAE


def set_statistics(vae: DetailVAE, meta: CacheMeta, scale: float = 1.0) -> None:
    """Normalise by the statistics of the cached detail, to a std of `scale`."""
    mean, std = torch.tensor(meta.mean).view(1, -1, 1, 1), torch.tensor(meta.std).view(1, -1, 1, 1)
    vae.set_detail_kernel(None)
    vae.set_detail_statistics(vae.layout.split(mean)[1].flatten(), vae.layout.split(std)[1].flatten() / scale)


def hash_statistics(vae: DetailVAE) -> str:
    """Return a hash of the statistics that a DetailVAE normalises by."""
    values = [vae.mean, vae.std, *([] if vae.detail_kernel is None else [vae.detail_kernel])]
    return hash_values([hash_values(value.flatten().tolist()) for value in values])


def set_residual(vae: DetailVAE, fit: DetailFit, scale: float) -> None:
    """Make a DetailVAE's z_d what the fit does not predict, normalised to a std of `scale`."""
    vae.set_detail_kernel(fit.kernel)
    vae.set_detail_statistics(fit.mean, fit.std / scale)
