"""Fixed reference work that is timed beside the models, to relate results of different minutes and machines."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

_SIDE = 256
_PULSE_SIDE = 128
_COPY_BYTES = 32 << 20
_REPEATS = 5
_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SINGLE_THREADED = dict.fromkeys(_VARIABLES, "1")
"""Environment of the process that runs the reference work. Libraries read these variables when they are loaded."""


class ReferenceTimes(NamedTuple):
    """Time of one pass of each reference kernel, in ms."""

    matmul_ms: float
    copy_ms: float


class ReferenceKernels:
    """Reference work on one thread: a product of 256 x 256 fp32 matrices (compute) and a copy of 32 MiB (memory)."""

    def __init__(self) -> None:
        self._a, self._b = np.random.default_rng(0).random((2, _SIDE, _SIDE), dtype=np.float32)
        self._product = np.empty_like(self._a)
        self._small = np.ascontiguousarray(self._a[:_PULSE_SIDE, :_PULSE_SIDE])
        self._small_product = np.empty_like(self._small)
        self._source = np.ones(_COPY_BYTES, dtype=np.uint8)
        self._target = np.zeros_like(self._source)
        self.time()

    def time(self) -> ReferenceTimes:
        """Return the median time of five passes of the product, and the time of one copy."""
        matmul_ms = _product_ms(self._a, self._b, self._product)
        start = time.perf_counter_ns()
        np.copyto(self._target, self._source)
        return ReferenceTimes(matmul_ms, (time.perf_counter_ns() - start) / 1e6)

    def small_product_ms(self) -> float:
        """Return the time of a 128 x 128 product in ms.

        It is short enough to be timed before and after every model's calls.
        """
        return _product_ms(self._small, self._small, self._small_product)


def _product_ms(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> float:
    """Return the median time of five passes in ms. The first one may find other data in the processor's caches."""
    clock = time.perf_counter_ns
    passes = []
    for _ in range(_REPEATS):
        start = clock()
        np.matmul(a, b, out=product)
        passes.append(clock() - start)
    return float(np.median(passes)) / 1e6
