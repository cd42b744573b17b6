"""What this machine can do at best, measured now with the threads and cores of the benchmark.

Arithmetic goes through ONNX Runtime, so the limit is that of its best matrix product and not of the data sheet.
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
"""Rows, inner width and columns of the products that are timed."""
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
    """Rates that were reached: bytes/s and operations/s, one a repeat."""

    bytes_per_s: dict[int, Samples]
    fp32_per_s: Samples
    int8_per_s: Samples


def measure_rates(threads: int, buffers: list[int]) -> MachineRates:
    """Time the products, and reading and copying within buffers of so many bytes in all."""
    return MachineRates(
        {size: bandwidth(size, threads) for size in buffers},
        [rate for shape in PRODUCTS for rate in product_rates("fp32", *shape, threads)],
        [rate for shape in PRODUCTS for rate in product_rates("int8", *shape, threads)],
    )


def last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Size of the largest cache of the first granted core, where the kernel shows it."""
    return max(_cache_bytes(root).values(), default=None)


def second_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Size of the cache that a core has for itself beside the first one, where the kernel shows it."""
    return _cache_bytes(root).get(2)


def _cache_bytes(root: Path) -> dict[int, int]:
    """Level -> bytes of its cache of the first granted core; the larger where instructions have their own."""
    sizes: dict[int, int] = {}
    for place in (root / f"sys/devices/system/cpu/cpu{granted_cores()[0]}/cache").glob("index*"):
        text, level = (place / "size").read_text().strip(), place / "level"
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        number = int(level.read_text()) if level.is_file() else 0
        sizes[number] = max(sizes.get(number, 0), int(text.rstrip("KM")) * unit)
    return sizes


def memory_buffer_bytes() -> int:
    """A buffer far beyond the last cache: four times its size, at least 256 MiB, at most 1 GiB or 1/8 of memory."""
    wanted = max(_USUAL_BUFFER, _BEYOND_CACHE * (last_level_cache_bytes() or 0))
    available = min(filter(None, (memory_bytes(), memory_limit_bytes())), default=_LARGEST_BUFFER * _SHARE_OF_MEMORY)
    return min(wanted, _LARGEST_BUFFER, available // _SHARE_OF_MEMORY)


def bandwidth(buffer_bytes: int, threads: int) -> Samples:
    """Bytes/s at which ``threads`` together copy, then read, a buffer of that size over and over.

    A copy counts what it reads and what it writes.
    """
    values = max(_SMALLEST_BUFFER, buffer_bytes) // threads // 8
    halves = [(np.ones(values, np.float32), np.ones(values, np.float32)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(*pair)

    def read(pair: tuple[np.ndarray, np.ndarray]) -> None:
        pair[0].max()
        pair[1].max()

    moved = values * 8 * threads
    return [rate for work in (copy, read) for rate in _rates(work, halves, moved)]


def _rates(
    work: Callable[[tuple[np.ndarray, np.ndarray]], None], parts: list[tuple[np.ndarray, np.ndarray]], moved: int
) -> Samples:
    """Bytes/s of ``work``, each thread on its own part, one sample a repeat; numpy lets threads run meanwhile."""
    repeats = max(1, int(_BANDWIDTH_SECONDS / max(_together(work, parts, 1), 1e-6)))
    return [moved * repeats / _together(work, parts, repeats) for _ in range(_BANDWIDTH_REPEATS)]


def _together(
    work: Callable[[tuple[np.ndarray, np.ndarray]], None], parts: list[tuple[np.ndarray, np.ndarray]], repeats: int
) -> float:
    """Seconds from the first thread's start to the last one's end."""
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
    """Operations/s of ``[rows, inner] @ [inner, columns]`` with constant weights, one sample a repeat."""
    graph, value = _product(arithmetic, rows, inner, columns)
    session = onnxruntime.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    operations = 2 * rows * inner * columns
    session.run(None, {"x": value})
    rates: Samples = []
    until = time.perf_counter() + _PRODUCT_SECONDS
    while len(rates) < _FEWEST_REPEATS or time.perf_counter() < until:
        began = time.perf_counter()
        session.run(None, {"x": value})
        rates.append(operations / (time.perf_counter() - began))
    return rates


def _product(arithmetic: str, rows: int, inner: int, columns: int) -> tuple[bytes, np.ndarray]:
    """A graph of one product, and what to feed it: floats, or unsigned 8-bit by signed 8-bit integers."""
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
