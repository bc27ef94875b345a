"""Networks for comparing images: Inception-v3 for FID, EfficientNet-Lite0 offline."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.errors import ModelError
from davae.losses.perceptual import lite0_input, lite0_network
from davae.pretrained.placement import own_device


@dataclass(frozen=True)
class Features:
    """Features (N,F) float32, and logits (N,K) of a network that classifies as Inception does."""

    features: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)


class Extractor(Protocol):
    """Network of features, with `name` as the key of a Frechet distance on them."""

    name: str

    def __call__(self, images: Tensor) -> Features:
        """images (B,3,H,W) in [-1,1], rounded to uint8 by the caller's files or by `to_uint8`."""
        ...


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1,1] as uint8, rounded as in a saved file."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Lite0Features(nn.Module):
    """Pooled EfficientNet-Lite0 features (1,280) of images resized to 224 pixels.

    They work offline, and a distance on them is never called FID.
    """

    name = "fd_lite0"
    size = 224

    def __init__(self) -> None:
        super().__init__()
        self.network = lite0_network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.6x on a CPU

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) in [-1,1] -> (B,1280)."""
        size, images = (self.size, self.size), images.to(next(self.parameters()))
        resized = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        maps = self.network.extract_features(lite0_input(resized.clamp(-1, 1)))  # type: ignore[operator]
        return Features(maps.mean((2, 3)))


class InceptionFeatures(nn.Module):
    """Inception-v3 of torch-fidelity with the TensorFlow weights of published FIDs.

    Args:
        weights: their `.pth` file; None takes torch.hub's cache, or downloads them.

    Raises:
        ModelError: a file that is not these weights, or no way to get them.
    """

    name = "fid"

    def __init__(self, weights: Path | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:
            try:  # torch-fidelity would run a pickle's code; this does not
                torch.load(weights, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ModelError(f"Inception weights {weights}: {' '.join(str(error).split())[:160]}") from error
        try:
            self.network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except (OSError, RuntimeError) as error:
            raise ModelError(
                "FID needs the Inception weights of torch-fidelity (pt_inception-2015-12-05-6726825d.pth): give their "
                f"file, or use the features lite0. {' '.join(str(error).split())[:120]}"
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """(B,3,H,W) in [-1,1] -> (B,2048) and logits (B,1008)."""
        features, logits = self.network(to_uint8(images).to(next(self.parameters()).device))
        return Features(features.float(), logits.float())


def make_extractor(name: str, weights: Path | None = None) -> Extractor:
    """Return the network `lite0` or `inception` on this process's device.

    Args:
        name: name of the network.
        weights: file of Inception's weights.

    Raises:
        ModelError: weights that the network does not read.
    """
    if weights is not None and name != "inception":
        raise ModelError(f"--feature-weights {weights}: read by --features inception; give both, or neither")
    network = InceptionFeatures(weights) if name == "inception" else Lite0Features()
    return network.to(own_device())


def extract(batches: Iterable[Tensor], extractor: Extractor) -> Features:
    """Return the features of all images of batches (B,3,H,W).

    Args:
        batches: images in [-1,1].
        extractor: the network.

    Raises:
        ValueError: no images, or features that are not finite.
    """
    return join_features([extractor(images) for images in batches])


def join_features(parts: list[Features]) -> Features:
    """Return the features of several batches as one, on the CPU.

    Raises:
        ValueError: no batch, or features that are not finite.
    """
    if not parts:
        raise ValueError("there are no images to measure")
    features = torch.cat([part.features.cpu() for part in parts])
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the images hold NaN or infinite pixels")
    logits = [part.logits.cpu() for part in parts if part.logits is not None]
    return Features(features, torch.cat(logits) if logits else None)
