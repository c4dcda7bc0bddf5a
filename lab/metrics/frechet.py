"""Fréchet distance between two sets of features, each taken as one normal distribution.

Letters: n samples, c channels. Which features is the caller's choice; distances are only comparable
between sets of the same features and about the same size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Moments(NamedTuple):
    """Mean (c) and covariance (c, c) of a set of features."""

    mean: Matrix
    covariance: Matrix


def moments(features: NDArray[np.floating]) -> Moments:
    """Mean and covariance of features (n, c).

    Raises:
        ValueError: fewer than two samples, another shape, or a value that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"found features {features.shape}, expected (n, c) with n of at least 2")
    values = features.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("found features with NaN or infinity; leave those clips out and say so")
    return Moments(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), which is 0 only for equal moments.

    The root's trace is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric, so covariances that
    are singular (fewer samples than channels) do no harm.

    Raises:
        ValueError: another number of channels.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"found {len(a.mean)} and {len(b.mean)} channels, expected the same features in both"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(np.maximum(inner, 0.0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    distance = apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return float(max(distance, 0.0))
