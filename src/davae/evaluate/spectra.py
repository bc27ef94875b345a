"""Power spectra of images, and the error of their finest details."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from davae.data.formats import open_image
from davae.errors import DataError
from davae.evaluate.plot import to_png
from davae.files.outputs import save_image

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class ImageSpectrum:
    """Mean power per Fourier coefficient of the luminance, in rings of spatial frequency.

    Attributes:
        frequency: (K,) cycles per pixel, 0 to 0.5.
        power: (K,) for pixels in [-1,1] and an orthonormal transform: white noise of variance v has power v in each ring.
    """

    frequency: np.ndarray
    power: np.ndarray


class SpectrumMeter:
    """Average the power spectrum over a set of images that arrive in batches."""

    def __init__(self) -> None:
        self.count, self.total = 0, np.zeros(0)
        self.shape: tuple[int, int] | None = None

    def add(self, images: Tensor) -> None:
        """Add images (B,3,H,W) in [-1,1].

        Raises:
            DataError: another size than the images before.
        """
        shape = (int(images.shape[-2]), int(images.shape[-1]))
        if self.shape is None:
            self.shape, self.total = shape, np.zeros(shape)
        if shape != self.shape:
            raise DataError(
                f"spectrum: an image has {shape[1]}x{shape[0]} pixels, the ones before {self.shape[1]}x{self.shape[0]}; "
                "compare images of one size"
            )
        weights = torch.tensor(LUMA, dtype=torch.float64)
        luma = torch.einsum("bchw,c->bhw", images.double().cpu(), weights)  # (B,H,W)
        self.total += torch.fft.fft2(luma, norm="ortho").abs().square().sum(0).numpy()
        self.count += len(images)

    def result(self) -> ImageSpectrum:
        """Return the mean spectrum in rings around k/min(H,W) cycles per pixel."""
        assert self.shape is not None
        height, width = self.shape
        side = min(height, width)
        radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])  # (H,W) cycles per pixel
        rings = np.round(radius * side).astype(int).ravel()
        kept = side // 2 + 1  # the corners beyond 0.5 cycles hold few coefficients
        sums = np.bincount(rings, weights=(self.total / self.count).ravel())[:kept]
        return ImageSpectrum(np.arange(kept) / side, sums / np.bincount(rings)[:kept])


def top_octave_error(generated: ImageSpectrum, real: ImageSpectrum) -> tuple[float, float]:
    """Return the error of the finest details in dB: root mean square, and mean with its sign.

    Over the rings between a quarter and half a cycle per pixel, the octave that an image of half the size cannot hold. A
    blurred set has a negative mean.

    Args:
        generated, real: spectra of images of one size.

    Raises:
        DataError: spectra of images of different sizes.
    """
    if len(generated.frequency) != len(real.frequency):
        raise DataError("spectrum: generated and real images differ in size; compare them at one size")
    inside = real.frequency > 0.25
    floor = np.finfo(np.float64).tiny
    ratio = 10 * np.log10(np.maximum(generated.power[inside], floor) / np.maximum(real.power[inside], floor))
    return float(np.sqrt(np.square(ratio).mean())), float(ratio.mean())


def image_spectra_plot(spectra: Mapping[str, ImageSpectrum]) -> bytes:
    """Plot power in dB against frequency, one line a set, as PNG bytes.

    The octave that an image of half the size cannot hold is shaded.

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


def draw_spectra(target: Path, generated: ImageSpectrum, real: ImageSpectrum) -> None:
    """Write the mean power spectra of two sets of images as a PNG.

    Args:
        target: the file to write.
        generated, real: the spectra.
    """
    plot = image_spectra_plot({"real": real, "generated": generated})
    save_image(open_image(io.BytesIO(plot)), target)
