"""Distances between two sets of images: Frechet, kernel, precision, recall, Inception score."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from davae.errors import DataError
from davae.evaluate.features import Features

LEAST = 4  # images a side: precision and recall look at three neighbours


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F,F) of a set's features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Return the Gaussian of features (N,F).

        Raises:
            DataError: fewer than two rows, or rows that are not finite.
        """
        return cls.of_rows(_finite_rows(features))

    @classmethod
    def of_rows(cls, x: np.ndarray) -> Gaussian:
        """Return the Gaussian of finite rows (N,F) in float64."""
        return cls(x.mean(0), np.cov(x, rowvar=False))


def _finite_rows(features: Tensor) -> np.ndarray:
    """Return features (N,F) in float64, after the checks of `Gaussian.of`."""
    if len(features) < 2:
        raise DataError(f"a Frechet distance needs at least 2 images a side, found {len(features)}")
    x = features.double().numpy()
    if not np.isfinite(x).all():
        raise DataError("features are not finite: the images hold NaN or infinite pixels")
    return x


def stored_gaussian(path: Path) -> Gaussian | None:
    """Return `mu` and `sigma` of Inception features in an `.npz`, None where it has none.

    ADM's reference files hold those of the whole training set next to a few of its images.

    Raises:
        DataError: a damaged file, or arrays that cannot be them.
    """
    try:
        with np.load(path) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz that can be read: {error}") from error
    if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
        raise DataError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}, expected (F,) and (F,F)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: mu or sigma is not finite")
    return Gaussian(mean, covariance)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance between the Gaussians of features a (N,F) and b (M,F).

    Below F rows it is taken from the rows: with A = X'X and B = Y'Y for centred, scaled rows X and Y, the eigenvalues of
    AB are the squared singular values of XY', so that tr (AB)^1/2 is the nuclear norm of a matrix (N,M).

    Args:
        a: features (N,F).
        b: features (M,F).

    Raises:
        DataError: as in `Gaussian.of`, or features of different lengths.
    """
    x, y = _finite_rows(a), _finite_rows(b)
    _check_lengths(x.shape[1], y.shape[1])
    if max(len(x), len(y)) >= x.shape[1]:
        return gaussian_distance(Gaussian.of_rows(x), Gaussian.of_rows(y))
    means = x.mean(0), y.mean(0)
    x, y = (x - means[0]) / np.sqrt(len(x) - 1), (y - means[1]) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.square(x).sum() + np.square(y).sum() - 2 * cross
    return float(max(distance, 0.0))


def _check_lengths(a: int, b: int) -> None:
    if a != b:
        raise DataError(f"features of length {a} cannot be compared with features of length {b}")


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by eigenvalues in float64.

    Args:
        a, b: Gaussians of features of one length.

    Raises:
        DataError: features of different lengths.
    """
    _check_lengths(len(a.mean), len(b.mean))
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = root @ b.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


@dataclass(frozen=True)
class DistributionScores:
    """Distances of generated images to real ones.

    `kernel` is KID's polynomial MMD, mean and spread over subsets of `subset` images.

    `inception` is (score, spread) over ten splits, where the features come with logits.
    """

    frechet: float
    kernel: float
    kernel_std: float
    subset: int
    precision: float
    recall: float
    inception: tuple[float, float] | None
    generated: int
    real: int

    def as_dict(self, frechet_name: str) -> dict[str, float]:
        """Return plain numbers, under names with the suffix of features other than Inception's."""
        own = "" if frechet_name == "fid" else frechet_name.removeprefix("fd")  # '_lite0'
        figures = {
            frechet_name: self.frechet,
            f"kid{own}": self.kernel,
            f"kid{own}_std": self.kernel_std,
            "kid_subset": self.subset,
            f"precision{own}": self.precision,
            f"recall{own}": self.recall,
            "generated": self.generated,
            "real": self.real,
        }
        if self.inception is not None:
            figures |= {"inception_score": self.inception[0], "inception_score_std": self.inception[1]}
        return figures


def check_enough(generated: int, real: int) -> int:
    """Return the smaller of two numbers of images.

    Raises:
        DataError: fewer than `LEAST` images on a side.
    """
    if (few := min(generated, real)) < LEAST:
        raise DataError(f"at least {LEAST} images a side are needed, found {generated} and {real}")
    return few


def distribution_scores(
    generated: Features, real: Features, *, subset: int = 1000, subsets: int = 100, stored: Gaussian | None = None
) -> DistributionScores:
    """Return every distance between two sets of images.

    Args:
        stored: what the Frechet distance is taken to, in place of the real images' own.
        subset, subsets: KID's subset size (lowered to the smaller set where that has fewer) and their number.

    Raises:
        DataError: fewer than `LEAST` images on a side.
    """
    size = min(subset, check_enough(len(generated), len(real)))
    kid = kid_features_to_metric(
        generated.features, real.features, kid_subset_size=size, kid_subsets=subsets, verbose=False
    )
    near = prc_features_to_metric(  # rows of the distances at a time: whole matrices of 50,000 images take 38 GiB
        generated.features, real.features, verbose=False, save_cpu_ram=True, prc_batch_size=1000
    )
    score = None
    if generated.logits is not None and len(generated) >= 10:
        found = isc_features_to_metric(generated.logits)
        score = (found["inception_score_mean"], found["inception_score_std"])
    if stored is None:
        distance = frechet_distance(generated.features, real.features)
    else:
        distance = gaussian_distance(Gaussian.of(generated.features), stored)
    kernel, spread = (kid[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    return DistributionScores(
        distance, kernel, spread, size, near["precision"], near["recall"], score, len(generated), len(real)
    )
