"""Decoder sensitivity: full, zeroed and random detail (Fig. S2a), and plain upsampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.analyze.figure import SHOWN, contact_sheet, figure_settings, summary_file, write_figure
from davae.data.images import to_images
from davae.dataset.look import as_data, batches, real_pictures
from davae.evaluate.features import make_extractor
from davae.evaluate.reconstruction import coding_parts, perceptual_distances, score_reconstructions
from davae.latent import LatentStatistics
from davae.recipes.sections import Data
from davae.sample.open import open_autoencoder, open_detail_vae
from davae.vae.base import image_side
from davae.vae.blocks import downsample
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range

Reconstruct = Callable[[Tensor], Tensor]
UNIT_NORMAL = "random detail, N(0, I)"


def raw_statistics(vae: DetailVAE) -> LatentStatistics:
    """Return the statistics of raw z_d, or, with `detail_residual`, of what z leaves of it."""
    return replace(vae.statistics, kernel=None)


def reconstructions(
    vae: DetailVAE, base_vae: Any, seed: int = 0, *, unit_normal: bool = False
) -> dict[str, Reconstruct]:
    """Return functions from images I_hr (B,3,sH,sW) in [-1,1] to reconstructions, by name.

    `base + bicubic`: the base autoencoder at its own resolution, enlarged. `zero detail`: z_d = 0; with
    `detail_residual` that is the detail that z predicts.
    `random detail`: z_d drawn from a normal with the channel means and deviations of the training set. With
    `detail_residual` z_d is in all of them what z leaves of the detail.

    Args:
        unit_normal: add `UNIT_NORMAL`, raw z_d drawn from N(0, I) as in the paper's Tab. S2a.
    """
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def base_bicubic(images: Tensor) -> Tensor:
        small = downsample(images.to(base_vae.device, base_vae.dtype), vae.layout.scale, vae.config["downsample"])
        small = decode_in_range(base_vae, encode_in_range(base_vae, small))  # (B,3,H,W)
        return F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)

    def with_detail(change: Callable[[Tensor], Tensor], normalised: bool) -> Reconstruct:
        @torch.no_grad()
        def reconstruct(images: Tensor) -> Tensor:
            latents, raw = encode_in_range(vae, images), raw_statistics(vae)  # (B,C+D,h,w), normalised
            if not normalised:
                latents = raw.denormalise(latents)
            z, z_d = vae.layout.split(latents)
            latents = vae.layout.join(z, change(z_d))
            return decode_in_range(vae, latents if normalised else raw.normalise(latents))

        return reconstruct

    def random(z_d: Tensor) -> Tensor:
        return torch.randn(z_d.shape, generator=generator).to(z_d)

    paper = {UNIT_NORMAL: with_detail(random, normalised=False)} if unit_normal else {}
    return {
        "base + bicubic": base_bicubic,
        "zero detail": with_detail(torch.zeros_like, normalised=False),
        "random detail": with_detail(random, normalised=True),
        **paper,
        "full": with_detail(lambda z_d: z_d, normalised=True),
    }


@torch.no_grad()
def decode_faded(vae: DetailVAE, latents: Tensor, weights: Tensor) -> Tensor:
    """Decode latents with channel i of raw z_d multiplied by weights[i].

    Args:
        vae: the autoencoder.
        latents: normalised z_hr (B,C+D,h,w).
        weights: (D,).

    Returns:
        Images (B,3,sH,sW).

    Weights of one give the reconstruction, weights of zero the `zero detail` of `reconstructions`.
    """
    raw = raw_statistics(vae)
    z, z_d = vae.layout.split(raw.denormalise(latents))
    faded = vae.layout.join(z, z_d * weights.to(z_d).view(1, -1, 1, 1))
    return decode_in_range(vae, raw.normalise(faded))  # (B,3,sH,sW)


RANDOM = {
    "random detail": "channel means and deviations of the training set",
    UNIT_NORMAL: "N(0, I), as in the paper",
}


def sensitivity_figure(
    vae: str,
    base: str,
    data: str | Data,
    out: Path,
    *,
    num: int,
    held_out: float,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    features: str = "lite0",
    feature_weights: Path | None = None,
) -> Path:
    """Write decoder sensitivity (Tab. S2a, S3): full, zeroed and random detail, base + bicubic.

    Random detail comes twice: with the statistics of the training set, and from N(0, I) as in the paper. Each row has PSNR,
    SSIM, perceptual distances and the Frechet distance to the originals (rFID with Inception's features).

    Args:
        vae: a DetailVAE, by the names that `open_detail_vae` takes.
        base: its base autoencoder.
        data: images.
        out: folder of the figure.
        num: most images.
        held_out: share of the images that is held out and decoded; 0 takes all.
        lpips, lpips_weights: network of an LPIPS distance, and its weights; None leaves it out.
        features, feature_weights: network of the Frechet distance, and its weights.
    """
    networks = {
        "features": features,
        "feature_weights": feature_weights,
        "lpips": lpips,
        "lpips_weights": lpips_weights,
    }
    settings = figure_settings(data, num, held_out, **networks)
    origin = {"vae": vae, "base": base, "data": as_data(data).source, "settings": settings}
    summary = summary_file(out, "sensitivity", origin)
    perceptual, extractor = perceptual_distances(lpips, lpips_weights), make_extractor(features, feature_weights)
    model, base_vae = open_detail_vae(vae), open_autoencoder(base)
    side = image_side(model)
    image_side(base_vae, side // model.layout.scale)  # it encodes them reduced
    images = real_pictures(data, side, held_out, "held_out", summary=summary)
    halving = coding_parts("sensitivity", model, side)
    shown = next(batches(images, SHOWN, SHOWN))
    rows, figures = {"original": to_images(shown)}, {}
    for name, reconstruct in reconstructions(model, base_vae, unit_normal=True).items():
        few = partial(halving, reconstruct)
        rows[name] = to_images(few(shown))
        scores = score_reconstructions(batches(images, num, halving.size), few, perceptual, extractor)
        figures[name] = scores.as_dict() | ({"random": RANDOM[name]} if name in RANDOM else {})
    return write_figure(out, "sensitivity", contact_sheet(rows, 128), {**origin, "rows": figures})
