"""Floats rounded to a ggml block type by ggml itself, several rows at once."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from compress.formats.gguf.blocks import row_bytes
from compress.formats.gguf.llama_cpp_library import library
from compress.utils.errors import StageError

_AT_ONCE = 1 << 16
"""Weights that a thread rounds together."""
_FLOATS = ctypes.POINTER(ctypes.c_float)


def rounded(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of type ``kind``, uint8 [rows, bytes of a row], from ``values`` [rows, columns].

    ``importance`` [columns] says how much the error of each column counts. Raises `StageError` where ggml fails, and
    `MissingExtraError` without it.
    """
    from gguf import GGMLQuantizationType

    loaded, number = library(), int(GGMLQuantizationType[kind])
    values = np.ascontiguousarray(values, dtype=np.float32)
    counts = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    weighed = None if counts is None else counts.ctypes.data_as(_FLOATS)
    rows, columns = values.shape
    size = row_bytes(kind, columns)
    made = np.empty((rows, size), dtype=np.uint8)

    def some(start: int, stop: int) -> int:
        source, target = values.ctypes.data_as(_FLOATS), made.ctypes.data_as(ctypes.c_void_p)
        return int(loaded.ggml_quantize_chunk(number, source, target, start * columns, stop - start, columns, weighed))

    step = max(1, _AT_ONCE // columns)
    starts = range(0, rows, step)
    # The first makes tables that the others read.
    done = some(0, min(step, rows))
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        done += sum(pool.map(some, starts[1:], (min(start + step, rows) for start in starts[1:])))
    if done != made.nbytes:
        raise StageError(f"llama.cpp rounded to {done:,} bytes of {kind}, where {made.nbytes:,} were expected.")
    return made
