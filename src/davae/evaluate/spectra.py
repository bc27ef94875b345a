"""Radial power spectra of latents (Fig. S5): how much of z and z_d lies at which spatial frequency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch import Tensor

from davae.evaluate.figure import to_png


@dataclass(frozen=True)
class Spectrum:
    """Mean power per Fourier coefficient in rings of spatial frequency (cycles per latent position, up to 0.5).

    Attributes:
        power: of channels standardised over the set, so that white noise has 1.
        energy: of channels as they are, their means over the set taken off: absolute, as the paper's Fig. S5.
    """

    frequency: np.ndarray
    power: np.ndarray
    energy: np.ndarray

    @property
    def high_share(self) -> float:
        """Share of the power (mean left out) in frequencies above a quarter cycle per position: half of Nyquist."""
        inside = self.frequency > 0
        weight = self.power[inside] * self.frequency[inside]  # a ring's number of coefficients grows with its radius
        return float(weight[self.frequency[inside] > 0.25].sum() / weight.sum())


def radial_power(latents: Tensor) -> Spectrum:
    """Spectrum of latents (N,c,h,w), averaged over N and c.

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
    """PNG against frequency, one line a group, without the mean: power of standardised channels, and absolute energy."""
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


def image_spectra_plot(spectra: Mapping[str, Any]) -> bytes:
    """Return a PNG: power in dB against frequency, one line a set; the octave that half the size cannot hold is shaded.

    Args:
        spectra: name -> spectrum of images with `frequency` (cycles per pixel) and `power`.
    """
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    axis.axvspan(0.25, 0.5, color="0.94", linewidth=0)
    for name, spectrum in spectra.items():
        power = 10 * np.log10(np.maximum(spectrum.power[1:], np.finfo(np.float64).tiny))
        axis.plot(spectrum.frequency[1:], power, linewidth=1.4, label=name)
    axis.set(xlabel="cycles per pixel", ylabel="power, dB", xlim=(0, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return to_png(figure)
