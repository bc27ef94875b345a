"""What latents look like and what they know: PCA pictures, a linear probe and silhouettes by class (Fig. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from davae.errors import DataError
from davae.evaluate.figure import to_png


def pca_pictures(latents: Tensor, size: int) -> list[Image.Image]:
    """Latents (N,c,h,w) as colour pictures of `size` pixels: the three main components over the whole set.

    Each component is stretched between its 1st and 99th percentile; fewer channels than three leave colours at grey.
    """
    count, channels, height, width = latents.shape
    rows = latents.cpu().double().permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    scores = rows @ axes[:3].T  # (N*h*w,3)
    low, high = (torch.quantile(scores[:100_000], q, dim=0) for q in (0.01, 0.99))
    colours = ((scores - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    pixels = (colours * 255).round().to(torch.uint8).reshape(count, height, width, 3).numpy()
    return [Image.fromarray(p).resize((size, size), Image.Resampling.NEAREST) for p in pixels]


def pooled(latents: Tensor) -> np.ndarray:
    """Return latents (N,c,h,w) averaged over a 2x2 grid of cells: (N,4c) features."""
    return F.adaptive_avg_pool2d(latents.float(), min(2, latents.shape[-1])).flatten(1).numpy()


def embed_points(latents: Tensor, seed: int = 0) -> np.ndarray:
    """Return a point of the plane for each of N latents, (N,2), by t-SNE of their standardised, pooled features.

    Raises:
        DataError: fewer than four latents.
    """
    count = len(latents)
    if count < 4:
        raise DataError(f"{count} images are too few for a scatter; take more with --num")
    features = StandardScaler().fit_transform(pooled(latents))
    return TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed).fit_transform(features)


def scatter_plot(points: dict[str, np.ndarray], labels: list[int]) -> bytes:
    """PNG of points (N,2), a panel a group and a colour a class (Fig. 3a)."""
    figure, axes = plt.subplots(1, len(points), figsize=(3.4 * len(points), 3.4), squeeze=False)
    classes = sorted(set(labels))
    colours = plt.get_cmap("tab20", max(len(classes), 2))
    rank = np.searchsorted(classes, labels)
    for axis, (name, places) in zip(axes[0], points.items(), strict=True):
        axis.scatter(
            places[:, 0], places[:, 1], c=rank, cmap=colours, vmin=-0.5, vmax=max(len(classes), 2) - 0.5, s=7
        )
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
    return to_png(figure)


@dataclass(frozen=True)
class ClassKnowledge:
    """How well classes stand apart in a latent: accuracy of a linear probe on held-out latents, mean silhouette."""

    probe_accuracy: float
    silhouette: float
    chance: float


def class_knowledge(latents: Tensor, labels: list[int], seed: int = 0) -> ClassKnowledge:
    """Probe and silhouette of latents (N,c,h,w), averaged over a 2x2 grid of cells first: (N,4c) features.

    The probe is a logistic regression on a random half, measured on the other.

    Raises:
        DataError: fewer than two classes, or too few pictures to find two in that half.
    """
    if len(set(labels)) < 2:
        raise DataError("class separability needs pictures of at least two classes")
    features = pooled(latents)
    targets = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(targets))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    if len(set(targets[train])) < 2:
        raise DataError(f"{len(labels)} pictures are too few to tell classes apart; take more with --num")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features[train], targets[train])
    scaled = StandardScaler().fit_transform(features)
    shares = np.bincount(targets[test]) / len(test)
    return ClassKnowledge(
        float(probe.score(features[test], targets[test])),
        float(silhouette_score(scaled, targets, random_state=seed)),
        float(shares.max()),
    )
