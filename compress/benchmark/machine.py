"""Limits of this machine, measured now with the threads and cores of the benchmark.

Arithmetic runs in ONNX Runtime, so its limit is that of ONNX Runtime's best matrix product, not of the data sheet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.runtimes.onnxruntime import session_options
from compress.utils.environment import granted_cores, memory_bytes, memory_limit_bytes

PRODUCTS = ((128, 512, 512), (256, 256, 1024), (512, 512, 512))
"""Rows, inner width and columns of the timed products."""
_PRODUCT_SECONDS = 0.06
_FEWEST_REPEATS = 5
_BANDWIDTH_SECONDS = 0.02
_BANDWIDTH_REPEATS = 5
_LARGEST_BUFFER, _SMALLEST_BUFFER = 1 << 30, 1 << 16
_USUAL_BUFFER = 1 << 28
_BEYOND_CACHE = 4
_SHARE_OF_MEMORY = 8

Samples = list[float]


@dataclass(frozen=True)
class MachineRates:
    """Measured rates in bytes/s (by the size of the buffer) and operations/s, one value a repeat."""

    bytes_per_s: dict[int, Samples]
    fp32_per_s: Samples
    int8_per_s: Samples


def measure_rates(threads: int, buffers: list[int]) -> MachineRates:
    """Time matrix products, and reading and copying in buffers of these sizes in bytes."""
    bytes_per_s = {size: bandwidth(size, threads) for size in buffers}
    fp32, int8 = (
        [rate for shape in PRODUCTS for rate in product_rates(arithmetic, *shape, threads)]
        for arithmetic in ("fp32", "int8")
    )
    return MachineRates(bytes_per_s, fp32, int8)


def last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Return the size of the largest cache of the first granted core, or None if the kernel doesn't show it."""
    caches = (root / f"sys/devices/system/cpu/cpu{granted_cores()[0]}/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in caches]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(text.rstrip("KM")) * units.get(text[-1:], 1) for text in texts), default=None)


def memory_buffer_bytes() -> int:
    """Return the size of a buffer that no cache holds.

    It is four times the last cache, at least 256 MiB, and at most 1 GiB or 1/8 of memory.
    """
    size = max(_USUAL_BUFFER, _BEYOND_CACHE * (last_level_cache_bytes() or 0))
    available = min(filter(None, (memory_bytes(), memory_limit_bytes())), default=_LARGEST_BUFFER * _SHARE_OF_MEMORY)
    return min(size, _LARGEST_BUFFER, available // _SHARE_OF_MEMORY)


def bandwidth(buffer_bytes: int, threads: int) -> Samples:
    """Return the bytes/s at which ``threads`` threads together copy, then read, a buffer of that size repeatedly.

    A copy counts the bytes that it reads and the bytes that it writes.
    """
    # Two arrays of 4-byte floats in each thread make up the buffer.
    values = max(_SMALLEST_BUFFER, buffer_bytes) // threads // 8
    halves = [(np.ones(values, np.float32), np.ones(values, np.float32)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(*pair)

    def read(pair: tuple[np.ndarray, np.ndarray]) -> None:
        pair[0].max()
        pair[1].max()

    rates = []
    for work in (copy, read):
        # One untimed repeat touches the memory and estimates the time of a repeat.
        repeats = max(1, int(_BANDWIDTH_SECONDS / max(_together(work, halves, 1), 1e-6)))
        moved = values * 8 * threads * repeats
        rates += [moved / _together(work, halves, repeats) for _ in range(_BANDWIDTH_REPEATS)]
    return rates


def _together(
    work: Callable[[tuple[np.ndarray, np.ndarray]], None], parts: list[tuple[np.ndarray, np.ndarray]], repeats: int
) -> float:
    """Return the seconds from the first thread's start to the last one's end."""
    # All threads start at the same moment. Otherwise the first ones would have the memory bus for themselves.
    start = threading.Barrier(len(parts))
    spans: list[tuple[float, float]] = []

    def run(part: tuple[np.ndarray, np.ndarray]) -> None:
        start.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work(part)
        spans.append((began, time.perf_counter()))

    workers = [threading.Thread(target=run, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def product_rates(arithmetic: str, rows: int, inner: int, columns: int, threads: int) -> Samples:
    """Return the operations/s of ``[rows, inner] @ [inner, columns]`` with constant weights, one sample a repeat.

    Args:
        arithmetic: `fp32` or `int8`.
        rows: Rows of the input.
        inner: Columns of the input and rows of the weights.
        columns: Columns of the weights.
        threads: Number of threads.
    """
    graph, value = _product(arithmetic, rows, inner, columns)
    session = onnxruntime.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    # A multiplication and an addition count as two operations.
    operations = 2 * rows * inner * columns
    # The first call allocates and packs the weights.
    session.run(None, {"x": value})
    rates: Samples = []
    until = time.perf_counter() + _PRODUCT_SECONDS
    while len(rates) < _FEWEST_REPEATS or time.perf_counter() < until:
        began = time.perf_counter()
        session.run(None, {"x": value})
        rates.append(operations / (time.perf_counter() - began))
    return rates


def _product(arithmetic: str, rows: int, inner: int, columns: int) -> tuple[bytes, np.ndarray]:
    """Return the graph of one product and its input: floats, or unsigned 8-bit by signed 8-bit integers.

    Args:
        arithmetic: `fp32` or `int8`.
        rows: Rows of the input.
        inner: Columns of the input and rows of the weights.
        columns: Columns of the weights.
    """
    generator = np.random.default_rng(0)
    if arithmetic == "fp32":
        value = generator.normal(size=(rows, inner)).astype(np.float32)
        weights = generator.normal(size=(inner, columns)).astype(np.float32)
        node, kinds = helper.make_node("MatMul", ["x", "w"], ["y"]), (TensorProto.FLOAT, TensorProto.FLOAT)
    else:
        value = generator.integers(0, 256, (rows, inner)).astype(np.uint8)
        weights = generator.integers(-127, 128, (inner, columns)).astype(np.int8)
        node, kinds = helper.make_node("MatMulInteger", ["x", "w"], ["y"]), (TensorProto.UINT8, TensorProto.INT32)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kinds[0], [rows, inner])],
        [helper.make_tensor_value_info("y", kinds[1], [rows, columns])],
        [numpy_helper.from_array(weights, "w")],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString()), value
