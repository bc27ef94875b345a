"""Frechet distance of generated and real pictures on EfficientNet-Lite0 features: `FD-lite0`, never called FID."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.losses.perceptual import lite0_input, lite0_network

FEATURES = 1280
INPUT_SIZE = 224


class Lite0Features(nn.Module):
    """Pooled EfficientNet-Lite0 features of pictures resized to 224 px."""

    def __init__(self) -> None:
        super().__init__()
        self.network = lite0_network()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> (B,1280)."""
        resized = F.interpolate(
            images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True
        )
        maps = self.network.extract_features(lite0_input(resized.clamp(-1, 1)))  # type: ignore[operator]
        return maps.mean((2, 3))


class GaussianFit:
    """Mean and covariance of features, accumulated in float64."""

    def __init__(self, features: int = FEATURES):
        self.count = 0
        self.sum = np.zeros(features)
        self.outer = np.zeros((features, features))

    def update(self, features: Tensor) -> None:
        """features (B,F). ValueError when one is not finite."""
        values = features.double().cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError("features are not finite: the pictures hold NaN or infinite pixels")
        self.count += len(values)
        self.sum += values.sum(0)
        self.outer += values.T @ values

    @property
    def mean(self) -> np.ndarray:
        return self.sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        return (self.outer - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by eigenvalues in float64.

    Raises:
        ValueError: with fewer than two pictures on a side.
    """
    if a.count < 2 or b.count < 2:
        raise ValueError(f"a Frechet distance needs at least 2 pictures a side, found {a.count} and {b.count}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = root @ b.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


def fit(batches: Iterable[Tensor], network: Lite0Features) -> GaussianFit:
    """Gaussian of the features of batches (B,3,H,W) in [-1,1]."""
    gaussian = GaussianFit()
    for images in batches:
        gaussian.update(network(images))
    return gaussian
