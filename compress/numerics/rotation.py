"""A rotation of embeddings after which the first dimensions hold the most."""

from __future__ import annotations

import numpy as np


def principal_rotation(embeddings: np.ndarray, dimensions: int) -> np.ndarray:
    """Of embeddings [n, d], the ``dimensions`` orthonormal rows [dimensions, d] that keep most of their squared length.

    Principal component analysis without centering: dot products and cosines, which retrieval reads, are of the vectors
    themselves and not of their distance to a mean. The rows are the leading eigenvectors of the second moment
    Xᵀ X / n (Eckart and Young 1936); each is signed so that its largest entry is positive. Raises `ValueError` for more
    dimensions than there are, or fewer embeddings than dimensions.
    """
    count, width = embeddings.shape
    if not 1 <= dimensions <= width:
        raise ValueError(f"{dimensions} of {width} dimensions cannot be kept")
    if count < dimensions:
        raise ValueError(f"{count} embeddings do not span {dimensions} dimensions")
    wide = embeddings.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide / count)
    rows = vectors[:, ::-1].T[:dimensions]
    signs = np.sign(rows[np.arange(dimensions), np.abs(rows).argmax(axis=1)])
    rotation: np.ndarray = (rows * signs[:, None]).astype(np.float32)
    return rotation


def kept_share(embeddings: np.ndarray, rotation: np.ndarray) -> float:
    """Which share of the squared length of embeddings [n, d] is left after a rotation [k, d]."""
    before = float(np.square(embeddings, dtype=np.float64).sum())
    return float(np.square(embeddings @ rotation.T, dtype=np.float64).sum()) / before
