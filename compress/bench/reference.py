"""Fixed work that is timed beside the models, so that results of different minutes and machines can be related."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

_SIDE = 256
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
        self._source = np.ones(_COPY_BYTES, dtype=np.uint8)
        self._target = np.zeros_like(self._source)
        self.time()

    def time(self) -> ReferenceTimes:
        """The median of five passes of the product, and one copy."""
        clock = time.perf_counter_ns
        products = []
        for _ in range(_REPEATS):
            start = clock()
            np.matmul(self._a, self._b, out=self._product)
            products.append(clock() - start)
        start = clock()
        np.copyto(self._target, self._source)
        return ReferenceTimes(float(np.median(products)) / 1e6, (clock() - start) / 1e6)
