"""Fixed work that is timed beside the models, so that results of different minutes and machines can be related."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

_SIDE = 256
_PULSE_SIDE = 128
_COPY_BYTES = 32 << 20
_REPEATS = 5
SINGLE_THREADED = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
"""Environment of the process that runs it; libraries read these when they are loaded."""


class ReferenceTimes(NamedTuple):
    """Milliseconds of one pass of each kernel."""

    matmul_ms: float
    copy_ms: float


class ReferenceKernels:
    """A product of two 256 x 256 fp32 matrices (compute), and a copy of 32 MiB (memory), on one thread."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._a, self._b = generator.random((2, _SIDE, _SIDE), dtype=np.float32)
        self._product = np.empty_like(self._a)
        self._small = np.ascontiguousarray(self._a[:_PULSE_SIDE, :_PULSE_SIDE])
        self._small_product = np.empty_like(self._small)
        self._source = np.ones(_COPY_BYTES, dtype=np.uint8)
        self._target = np.zeros_like(self._source)
        self.time()

    def time(self) -> ReferenceTimes:
        """The median of five passes of the product, and one copy."""
        matmul_ms = _product_ms(self._a, self._b, self._product)
        start = time.perf_counter_ns()
        np.copyto(self._target, self._source)
        return ReferenceTimes(matmul_ms, (time.perf_counter_ns() - start) / 1e6)

    def pulse_ms(self) -> float:
        """Milliseconds of a product of 128 x 128: short enough to be timed before and after every model's turn."""
        return _product_ms(self._small, self._small, self._small_product)


def _product_ms(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> float:
    """The median of five passes; the first may find the processor's caches used by somebody else."""
    clock = time.perf_counter_ns
    passes = []
    for _ in range(_REPEATS):
        start = clock()
        np.matmul(a, b, out=product)
        passes.append(clock() - start)
    return float(np.median(passes)) / 1e6
