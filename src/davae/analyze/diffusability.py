"""Difficulty of a detail latent for a transformer, measured before one is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.analyze.figure import figure_settings, summary_file, write_figure
from davae.analyze.latents import raw_latents
from davae.analyze.spectra import radial_power, spectra_plot
from davae.backbones.linear_gaussian import expected_velocity_error
from davae.dataset.look import as_data, real_pictures
from davae.latent import LatentLayout
from davae.losses.flow_matching import interpolate, velocity_target
from davae.recipes.sections import Data
from davae.sample.open import open_detail_vae
from davae.vae.base import image_side
from davae.vae.base_decoder import neighbourhoods, solve_ridge

WIDTH, BATCH, RATE = 64, 32, 2e-3  # of the probe
LEVELS = 41  # quantiles of the noise level
SCALES = (1.0, 0.5, 0.25)  # of the detail, for the leak


def diffusability_figure(
    vae: str, data: str | Data, out: Path, *, num: int, held_out: float, probe_steps: int = 300, seed: int = 0
) -> Path:
    """Measure a DetailVAE's latents and write `diffusability.png` (spectra) and `.json`.

    With `stage2.detail_residual` z_d is what z leaves of it, as stage 2 learns it.

    Args:
        vae: a DetailVAE's folder, or a run's.
        num: images; three quarters fit what is fitted, the others measure.
        probe_steps: steps of the probe denoiser; 0 leaves it out.

    Returns:
        The figure's path.
    """
    settings = figure_settings(data, num, held_out, probe_steps=probe_steps, seed=seed)
    origin = {"vae": vae, "data": as_data(data).source, "settings": settings}
    summary = summary_file(out, "diffusability", origin)
    model = open_detail_vae(vae)
    images = real_pictures(data, image_side(model), held_out, "held_out", summary=summary)
    z, z_d, _ = raw_latents(model, images, num)
    if model.detail_kernel is not None:  # what stage 2 learns
        z, z_d = model.layout.split(model.statistics.to(z).normalise(model.layout.join(z, z_d)))
    figures = {**origin, **latent_measures(z, z_d), "base_leak": base_leak(z, z_d, model.layout)}
    if probe_steps:
        figures["probe"] = probe_loss(z, z_d, model.layout, probe_steps, seed)
    return write_figure(out, "diffusability", spectra_plot({"z": radial_power(z), "z_d": radial_power(z_d)}), figures)


def latent_measures(z: Tensor, z_d: Tensor) -> dict[str, Any]:
    """Measure the dependence of a detail latent on its base, and its channels and frequencies.

    `alignment_r2`: share of the variance of z_d that a linear map of the 3x3 neighbourhood of z explains on images that it
    was not fitted to. `channel_correlation`: mean |correlation| of two channels. `effective_dimension`: participation ratio
    (sum l)^2 / sum l^2 of the eigenvalues l of the channels' correlations, 1 to their number. `high_share`: share of the
    power above half the highest frequency.

    Args:
        z: raw base latents (N,C,h,w).
        z_d: raw detail latents (N,D,h,w).
    """
    return {
        "alignment_r2": alignment_r2(z, z_d),
        "detail": _channel_use(z_d) | {"high_share": radial_power(z_d).high_share},
        "base": _channel_use(z) | {"high_share": radial_power(z).high_share},
    }


def alignment_r2(z: Tensor, z_d: Tensor) -> float:
    """Return R^2 of the best linear map from 3x3 neighbourhoods of z to z_d.

    The map is fitted to three quarters of the images and measured on the last quarter.

    Args:
        z: raw base latents (N,C,h,w).
        z_d: raw detail latents (N,D,h,w).
    """
    cut = max(1, len(z) * 3 // 4)
    x = neighbourhoods(z)  # (N,hw,9C)
    y = z_d.double().cpu().flatten(2).transpose(1, 2)  # (N,hw,D)
    mean_x, mean_y = x[:cut].mean((0, 1)), y[:cut].mean((0, 1))
    fit_x, fit_y = (x[:cut] - mean_x).flatten(0, 1), (y[:cut] - mean_y).flatten(0, 1)
    weight = solve_ridge(fit_x, fit_y, 1e-4)
    rest = y[cut:] if len(z) > cut else y
    error = rest - mean_y - ((x[cut:] if len(z) > cut else x) - mean_x) @ weight
    return float(1 - error.square().sum() / (rest - mean_y).square().sum())


def base_leak(z: Tensor, z_d: Tensor, layout: LatentLayout) -> dict[str, float]:
    """Return by how much the noised detail helps a linear model to predict the base's velocity.

    An aligned z_d holds z again, under noise of its own. A transformer that sees both at one level knows the base better
    than its pretrained weights expect there: they have to be learned anew, the more the larger the leak is.
    `stage2.detail_scale` c lowers it. The models are Gaussian, one for the channels of a position, fitted to all images.

    Args:
        z, z_d: raw latents (N,C,h,w), (N,D,h,w).
        layout: of both.

    Returns:
        `alone`: the error from z_t alone, mean over a logit-normal level; `c=...`: the share of it that c z_d removes.
    """
    correlation = _correlation(layout.join(z, z_d))
    share = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = torch.sigmoid(torch.special.ndtri(share))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    base = layout.by_group(one, 0 * one).flatten().bool()  # (C+D,)
    alone = expected_velocity_error(correlation[base][:, base], levels).mean()
    found = {"alone": float(alone)}
    for scale in SCALES:
        size = layout.by_group(one, scale * one).flatten()
        error = expected_velocity_error(correlation * size * size.unsqueeze(1), levels)[:, base].mean()
        found[f"c={scale:g}"] = float(1 - error / alone)
    return found


def _correlation(latents: Tensor) -> Tensor:
    """Return correlations (c,c) of the channels of latents (N,c,h,w), 0 with a constant one."""
    flat = latents.double().transpose(0, 1).flatten(1)  # (c,Nhw)
    return torch.corrcoef(flat).nan_to_num(0.0).fill_diagonal_(1.0)


def _channel_use(latents: Tensor) -> dict[str, float]:
    correlation = _correlation(latents)
    count = len(correlation)
    pairs = correlation[~torch.eye(count, dtype=torch.bool)]
    eigenvalues = torch.linalg.eigvalsh(correlation).clamp(min=0)
    return {
        "channel_correlation": float(pairs.abs().mean()) if count > 1 else 0.0,
        "effective_dimension": float(eigenvalues.sum().square() / eigenvalues.square().sum()),
        "channels": count,
    }


class Probe(nn.Module):
    """A small convolutional velocity model: three layers over x_t and its level t.

    Args:
        channels: C + D.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels + 1, WIDTH, 3, padding=1)
        self.middle = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B,C+D,h,w), (B,) -> (B,C+D,h,w)."""
        level = t.view(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[-2:])
        hidden = F.silu(self.first(torch.cat([x_t, level], dim=1)))  # (B,64,h,w)
        return self.last(hidden + F.silu(self.middle(hidden)))


def probe_loss(z: Tensor, z_d: Tensor, layout: LatentLayout, steps: int, seed: int = 0) -> dict[str, float]:
    """Train the probe on standardised latents, and measure it on the last quarter.

    Args:
        z, z_d: raw latents (N,C,h,w), (N,D,h,w).
        layout: of both.
        steps: of Adam, on batches of 32.

    Returns:
        `base` and `detail`: mean squared errors of the velocity, 2 for a probe that predicts nothing; `ratio` of the two.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = layout.join(z.float(), z_d.float())
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True).clamp(min=1e-4)
    cut = max(1, len(latents) * 3 // 4)
    train, test = latents[:cut], latents[cut:] if len(latents) > cut else latents
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(layout.channels)
    optimizer = torch.optim.Adam(probe.parameters(), RATE)

    def loss_on(chosen: Tensor) -> Tensor:
        noise = torch.randn(chosen.shape, generator=generator)
        t = torch.rand(len(chosen), generator=generator)
        error = probe(interpolate(chosen, noise, t), t) - velocity_target(chosen, noise)
        base, detail = layout.split(error.square())
        return torch.stack([base.mean(), detail.mean()])

    for _ in range(steps):
        rows = torch.randint(len(train), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss_on(train[rows]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        base, detail = torch.stack([loss_on(test) for _ in range(8)]).mean(0).tolist()
    return {"base": base, "detail": detail, "ratio": detail / base, "steps": float(steps)}
