"""An image through the base and the upgraded autoencoder, its detail channels faded."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from davae.analyze.sensitivity import decode_faded, reconstructions
from davae.app.pair import LOCK, Pair
from davae.data.images import fit_square, to_images, to_tensor
from davae.errors import ModelError
from davae.evaluate.reconstruction import psnr
from davae.sample.finite import check_reconstruction
from davae.vae.detail_vae import DetailVAE

ERROR_SHOWN = 0.25  # mean absolute error of a pixel, of a range of 1, that the error map shows brightest


@dataclass(frozen=True)
class Encoded:
    """An image at the model's size, its base reconstruction and its latents.

    Attributes:
        original: the image.
        base: reconstruction of the base autoencoder at its own resolution, enlarged by bicubic interpolation.
        latents: normalised z_hr (1,C+D,h,w).
    """

    original: Image.Image
    base: Image.Image | None
    latents: Tensor


def encode(pair: Pair, photo: Image.Image, resolution: int | None = None) -> Encoded:
    """Encode the centre square of an image.

    Args:
        pair: the models.
        photo: at least `resolution` pixels wide and high.
        resolution: pixels to reduce the square to; by default the model's own.

    Raises:
        ModelError: the pair has no upgraded autoencoder.
        DataError: the photo is smaller than that.
    """
    original = fit_square(photo, resolution or pair.resolution)
    images = to_tensor(original)[None]  # (1,3,sH,sW)
    vae = _vae(pair)
    with LOCK, torch.no_grad():
        images = images.to(vae.device, vae.dtype)
        latents = vae.encode(images).latent_dist.mode()  # type: ignore[union-attr]
        small = None
        if pair.base is not None:
            base = reconstructions(vae, pair.base.vae)["base + bicubic"]
            small = to_images(check_reconstruction(base(images)))[0]
    return Encoded(original, small, latents)


def weights_of(channels: int, strength: float, first: int, last: int) -> Tensor:
    """Return weights (D,) of the detail channels: `strength` for some, 0 for the others.

    Args:
        channels: D.
        strength: weight.
        first, last: channels that get it, counted from 1, both included.
    """
    weights = torch.zeros(channels)
    weights[max(0, first - 1) : last] = strength
    return weights


def decode_weighted(pair: Pair, encoded: Encoded, weights: Tensor) -> Image.Image:
    """Decode an image with raw z_d multiplied by weights (D,)."""
    with LOCK:
        return to_images(check_reconstruction(decode_faded(_vae(pair), encoded.latents, weights)))[0]


def _vae(pair: Pair) -> DetailVAE:
    if pair.upgraded is None:
        raise ModelError(f"{pair.name} is a base model; open an upgraded one to see what its detail channels add")
    return pair.upgraded.vae


def error_map(original: Image.Image, image: Image.Image) -> Image.Image:
    """Return a map of each pixel's mean absolute error, brightest at ERROR_SHOWN or more."""
    error = np.abs(_pixels(original) - _pixels(image)).mean(-1) / ERROR_SHOWN
    return Image.fromarray((matplotlib.colormaps["inferno"](error.clip(0, 1))[..., :3] * 255).astype(np.uint8))


def psnr_of(original: Image.Image, image: Image.Image) -> float:
    """Return the PSNR in dB of one image against another of the same size, at most 100."""
    both = [torch.from_numpy(_pixels(one)).movedim(-1, 0)[None] for one in (image, original)]  # (1,3,H,W)
    return float(psnr(*both))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255
