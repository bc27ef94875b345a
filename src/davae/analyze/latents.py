"""Latent maps (Fig. 3): images by PCA, and class separability by probe and silhouette."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

from davae.analyze.figure import SHOWN, check_figure, contact_sheet, figure_settings, summary_file, write_figure
from davae.data.images import ImageDataset, to_images
from davae.dataset.look import as_data, batches, numbered_batches, real_pictures
from davae.errors import DataError
from davae.evaluate.plot import to_png
from davae.evaluate.reconstruction import coding_parts
from davae.losses.alignment import group_mean
from davae.recipes.sections import Data
from davae.sample.open import open_detail_vae
from davae.vae.base import image_side
from davae.vae.detail_vae import DetailVAE


def pca_images(latents: Tensor, size: int) -> list[Image.Image]:
    """Show latents as colour images: their three main components over the whole set.

    Each component is stretched between its 1st and 99th percentile; fewer channels than three leave colours at grey.

    Args:
        latents: (N,c,h,w).
        size: side of the images, pixels.
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
    """Return features (N,4c): latents (N,c,h,w) averaged over a 2x2 grid of cells."""
    return F.adaptive_avg_pool2d(latents.float(), min(2, latents.shape[-1])).flatten(1).numpy()


def embed_points(latents: Tensor, seed: int = 0) -> np.ndarray:
    """Return a point for each of N latents, (N,2), by t-SNE of pooled features.

    Args:
        latents: (N,c,h,w).
        seed: seed of t-SNE.

    Raises:
        DataError: fewer than four latents.
    """
    count = len(latents)
    if count < 4:
        raise DataError(f"{count} images are too few for a scatter; take more with --num")
    features = StandardScaler().fit_transform(pooled(latents))
    return TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed).fit_transform(features)


def scatter_plot(points: dict[str, np.ndarray], labels: list[int]) -> bytes:
    """Plot points with a panel a group and a colour a class (Fig. 3a).

    Args:
        points: name of a group -> (N,2).
        labels: class of each point.

    Returns:
        PNG bytes.
    """
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
    """Separability of classes in a latent.

    Attributes:
        probe_accuracy: accuracy of a linear probe on held-out latents.
        silhouette: mean silhouette.
        chance: accuracy of the most frequent class.
    """

    probe_accuracy: float
    silhouette: float
    chance: float


def class_knowledge(latents: Tensor, labels: list[int], seed: int = 0) -> ClassKnowledge:
    """Measure class separability of latents, averaged over a 2x2 grid of cells first.

    The probe is a logistic regression on a random half, measured on the other.

    Args:
        latents: (N,c,h,w).
        labels: class of each latent.
        seed: seed of the split.

    Raises:
        DataError: fewer than two classes, or too few images to find two in that half or two of one class.
    """
    if len(set(labels)) < 2:
        raise DataError("class separability needs images of at least two classes")
    if len(set(labels)) == len(labels):
        raise DataError(f"each of the {len(labels)} images has a class of its own; take more with --num")
    features = pooled(latents)
    targets = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(targets))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    if len(set(targets[train])) < 2:
        raise DataError(f"{len(labels)} images are too few to tell classes apart; take more with --num")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features[train], targets[train])
    scaled = StandardScaler().fit_transform(features)
    shares = np.bincount(targets[test]) / len(test)
    return ClassKnowledge(
        float(probe.score(features[test], targets[test])),
        float(silhouette_score(scaled, targets, random_state=seed)),
        float(shares.max()),
    )


@torch.no_grad()
def raw_latents(vae: DetailVAE, images: ImageDataset, num: int) -> tuple[Tensor, Tensor, list[int | None]]:
    """Encode images into raw latents, without those that cannot be read.

    Args:
        vae: the autoencoder.
        images: the images.
        num: most images.

    Returns:
        z (N,C,h,w), z_d (N,D,h,w) and the N labels.
    """
    halving, parts, labels = coding_parts("latents", vae, images.resolution), [], []

    def encode(batch: Tensor) -> Tensor:
        raw = vae.encode_raw(batch.to(vae.device))
        return torch.cat([raw.z, raw.mean], dim=1).cpu()  # (B,C+D,h,w)

    for positions, batch in numbered_batches(images, num, halving.size):
        parts.append(halving(encode, batch))
        labels += [images.source.label(images.indices[i]) for i in positions]
    z, z_d = (part.contiguous() for part in vae.layout.split(torch.cat(parts)))
    return z, z_d, labels


def latents_figure(
    vae: str, unaligned: str | None, data: str | Data, out: Path, *, num: int, held_out: float
) -> Path:
    """Write latent maps, class separability and a scatter by class (Fig. 3).

    The groups are z, aligned z_d and, from a second run, unaligned z_d.

    The scatter is a figure of its own, `latents-points`.

    Args:
        vae: a DetailVAE, by the names that `open_detail_vae` takes.
        unaligned: one that was trained without alignment; None leaves it out.
        data: images with classes.
        out: folder of the figures.
        num: most images.
        held_out: share of the images that is held out and encoded; 0 takes all.
    """
    origin: dict[str, Any] = {"vae": vae, "unaligned": unaligned, "data": as_data(data).source}
    origin["settings"] = figure_settings(data, num, held_out)
    summary = summary_file(out, "latents", origin)
    check_figure(out, "latents-points")
    models = {"z_d": open_detail_vae(vae)}
    if unaligned is not None:
        models = {"aligned z_d": models["z_d"], "unaligned z_d": open_detail_vae(unaligned)}
    first = next(iter(models.values()))
    images = real_pictures(data, image_side(first), held_out, "held_out", summary=summary)
    groups: dict[str, Tensor] = {}
    labels: list[int | None] = []
    for name, model in models.items():
        z, z_d, labels = raw_latents(model, images, num)
        groups |= {"z": z, name: z_d}
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise DataError(
            "class separability needs a class for every image: sub-folders, or `.cls` files in the shards"
        )
    rows = {"original": to_images(next(batches(images, num, SHOWN)))}  # the first of the same choice
    figures = {}
    for name, group in groups.items():
        rows[name] = pca_images(group, 128)[:SHOWN]
        z = groups["z"]
        alignment = None if name == "z" else float((group_mean(group, z.shape[1]) - z).square().mean() / z.var())
        figures[name] = {**asdict(class_knowledge(group, known)), "alignment_error_over_variance": alignment}
    points = {name: embed_points(group) for name, group in groups.items()}
    places = {name: np.round(found, 3).tolist() for name, found in points.items()}
    write_figure(out, "latents-points", scatter_plot(points, known), {**origin, "labels": known, "points": places})
    return write_figure(out, "latents", contact_sheet(rows, 128), {**origin, "pictures": len(known), "rows": figures})
