"""Statistics of weight values, read tensor by tensor from memory-mapped files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from compress.inspection.tensors import ModelContents
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen

OUTLIER_SIGMAS = 6.0
CHUNK_ELEMENTS = 1 << 20


class WeightStatistics(Frozen):
    """Statistics of a tensor's finite values: stored integers in quantized ONNX, dequantized values in GGUF."""

    sparsity: float = Field(description="share of values that are exactly zero")
    minimum: float
    maximum: float
    mean: float
    std: float = Field(description="population standard deviation")
    outliers: float = Field(description="share of values further than 6 standard deviations from the mean")
    not_finite: int = Field(description="number of NaN and infinite values")


def measure_weights(contents: ModelContents, progress: Progress) -> dict[str, WeightStatistics]:
    """Return the statistics of every weight by name, except packed and sub-byte ones."""
    weights = [tensor for tensor in contents.tensors if tensor.role == "weight" and not tensor.tied_to]
    readable = [item for item in weights if item.readable and item.elements > 0 and "complex" not in item.dtype]
    tracked = progress.track(readable, "reading weights", len(readable))
    return {tensor.name: describe(tensor.values()) for tensor in tracked}


def describe(values: np.ndarray) -> WeightStatistics:
    """Return the statistics of a non-empty array, in double precision and three passes over chunks."""
    flat = values.reshape(-1)
    count = zeros = 0
    total, low, high = 0.0, math.inf, -math.inf
    # First pass: counts, sum and range.
    for piece in _finite_pieces(flat):
        count += piece.size
        zeros += piece.size - int(np.count_nonzero(piece))
        total += float(piece.sum())
        if piece.size:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if not count:
        low = high = math.nan
    size = count or 1
    mean = total / count if count else math.nan
    # Second pass: deviations from the mean, which avoids cancellation.
    std = math.sqrt(sum(float(np.square(piece - mean).sum()) for piece in _finite_pieces(flat)) / size)
    # Third pass: outliers.
    far = sum(int(np.count_nonzero(np.abs(piece - mean) > OUTLIER_SIGMAS * std)) for piece in _finite_pieces(flat))
    return WeightStatistics(
        sparsity=zeros / size,
        minimum=low,
        maximum=high,
        mean=mean,
        std=std if count else math.nan,
        outliers=far / size,
        not_finite=flat.size - count,
    )


def _finite_pieces(flat: np.ndarray) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        piece = flat[start : start + CHUNK_ELEMENTS].astype(np.float64)
        yield piece[np.isfinite(piece)]
