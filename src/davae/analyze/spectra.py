"""Radial power spectra of latents (Fig. S5): power of z and z_d by spatial frequency."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch import Tensor

from davae.analyze.figure import figure_settings, summary_file, write_figure
from davae.analyze.latents import raw_latents
from davae.dataset.look import as_data, real_pictures
from davae.evaluate.plot import to_png
from davae.losses.alignment import group_mean
from davae.recipes.sections import Data
from davae.sample.open import open_detail_vae
from davae.vae.base import image_side
from davae.vae.detail_vae import DetailVAE


@dataclass(frozen=True)
class Spectrum:
    """Mean power per Fourier coefficient of latents, in rings of spatial frequency.

    Attributes:
        power: of channels standardised over the set, so that white noise has 1.
        energy: of channels as they are, their means over the set taken off: absolute, as the paper's Fig. S5.
    """

    frequency: np.ndarray
    power: np.ndarray
    energy: np.ndarray

    @property
    def high_share(self) -> float:
        """Return the share of the power above a quarter cycle per position, half of Nyquist."""
        inside = self.frequency > 0
        weight = self.power[inside] * self.frequency[inside]  # a ring's number of coefficients grows with its radius
        return float(weight[self.frequency[inside] > 0.25].sum() / weight.sum())


def radial_power(latents: Tensor) -> Spectrum:
    """Return the spectrum of latents (N,c,h,w), averaged over N and c.

    White noise has power 1 everywhere, and its variance as energy.

    Raises:
        ValueError: latents that are not square, or smaller than 4 positions.
    """
    side = latents.shape[-1]
    if latents.shape[-2] != side or side < 4:
        raise ValueError(f"spectra need square latents of at least 4 positions, found {tuple(latents.shape[-2:])}")
    x = latents.cpu().double()
    deviation = x.std((0, 2, 3), unbiased=False, keepdim=True).clamp(min=1e-8)  # (1,c,1,1)
    squares = torch.fft.fft2(x - x.mean((0, 2, 3), keepdim=True), norm="ortho").abs().square()  # (N,c,h,w)
    power = (squares / deviation.square()).mean((0, 1)).numpy()  # (h,w)
    energy = squares.mean((0, 1)).numpy()
    axis = np.fft.fftfreq(side)
    radius = np.hypot(axis[:, None], axis[None])
    rings = np.round(radius * side).astype(int)
    kept = np.arange(side // 2 + 1)  # corners beyond Nyquist have few coefficients
    power, energy = (np.array([values[rings == ring].mean() for ring in kept]) for values in (power, energy))
    return Spectrum(kept / side, power, energy)


def spectra_plot(spectra: dict[str, Spectrum]) -> bytes:
    """Plot power of standardised channels and absolute energy against frequency.

    Args:
        spectra: name of a group -> its spectrum.

    Returns:
        PNG bytes.
    """
    figure, (axis, absolute) = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for name, spectrum in spectra.items():
        style = {"marker": "o", "markersize": 3, "linewidth": 1.4, "label": name}
        axis.plot(spectrum.frequency[1:], spectrum.power[1:], **style)
        absolute.plot(spectrum.frequency[1:], spectrum.energy[1:], **style)
    axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":", label="white noise")
    axis.set(yscale="log", xlabel="cycles per latent position", ylabel="power (channels standardised)")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if _within(axis.get_ylim(), tick)])
    absolute.set(yscale="log", xlabel="cycles per latent position", ylabel="energy (raw latents)")
    for part in (axis, absolute):
        part.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return to_png(figure)


def _within(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]


def _learned_detail(vae: DetailVAE, z: Tensor, z_d: Tensor) -> Tensor:
    """Return z_d - K * z (N,D,h,w) in the units of z_d, which `stage2.detail_residual` learns."""
    statistics, latents = vae.statistics.to(z), vae.layout.join(z, z_d)
    return vae.layout.split(replace(statistics, kernel=None).denormalise(statistics.normalise(latents)))[1]


def spectra_figure(vae: str, data: str | Data, out: Path, *, num: int, held_out: float) -> Path:
    """Write radial spectra of z, z_d and the grouped mean of z_d (Fig. S5).

    A DetailVAE with a kernel K adds z_d - K * z.

    Args:
        vae: a DetailVAE, by the names that `open_detail_vae` takes.
        data: images.
        out: folder of the figure.
        num: most images.
        held_out: share of the images that is held out and encoded; 0 takes all.
    """
    origin = {"vae": vae, "data": as_data(data).source, "settings": figure_settings(data, num, held_out)}
    summary = summary_file(out, "spectra", origin)
    model = open_detail_vae(vae)
    images = real_pictures(data, image_side(model), held_out, "held_out", summary=summary)
    z, z_d, _ = raw_latents(model, images, num)
    groups = {"z": z, "z_d": z_d, "group mean of z_d": group_mean(z_d, z.shape[1])}
    if model.detail_kernel is not None:
        groups["z_d without what z predicts"] = _learned_detail(model, z, z_d)
    found = {name: radial_power(latents) for name, latents in groups.items()}
    figures = {
        name: {key: values.tolist() for key, values in vars(s).items()} | {"high_share": s.high_share}
        for name, s in found.items()
    }
    return write_figure(out, "spectra", spectra_plot(found), {**origin, "groups": figures})
