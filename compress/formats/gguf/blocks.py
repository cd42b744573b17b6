"""Quantized weights as llama.cpp's blocks of 32: the same integers and scales, packed as ggml-common.h lays them out.

Q4_0 and Q8_0 hold `integer * scale`, Q4_1 and Q5_1 `integer * scale + minimum`, with scale and minimum in float16. A
group of 64 becomes two blocks with the same scale. What has its zero in the middle of the range is kept to the bit;
minima are the one thing that is rounded (`-zero * scale` may need more than float16's 11 bits).
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.gguf.llama_cpp_library import library
from compress.utils.errors import ModelError, StageError

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight


BLOCK = 32
"""Weights of a row that share a scale in every type that stores our integers unchanged."""
_SIGNED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_WITH_MINIMUM = {"Q4_1": 4, "Q5_1": 5}

_AT_ONCE = 1 << 16
"""Weights that a thread rounds together."""
_FLOATS = ctypes.POINTER(ctypes.c_float)

K_TYPES = ("Q2_K", "Q3_K")
_LENGTH, _PART = 256, 16
"""Weights of a block, and those that share a scale."""
_APART = 0.5
"""How far the steps that are tried lie from each other, in whole numbers of them."""


def block_length(kind: str) -> int:
    """Return the number of weights per block of a type: 1, 32 or 256."""
    return _sizes(kind)[0]


def row_bytes(kind: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` weights, a multiple of the type's `block_length`."""
    length, size = _sizes(kind)
    return columns // length * size


def _sizes(kind: str) -> tuple[int, int]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    length, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(length), int(size)


def block_type(bits: int, symmetric: bool, name: str) -> str:
    """Return the smallest type that holds integers of ``bits`` bits; raise `ModelError` for ``name`` if there is none.

    Two and three bits go into a type of four, which is exact but no smaller (`k_blocks` has types that are).
    """
    types = _SIGNED if symmetric else _WITH_MINIMUM
    for kind, held in types.items():
        if held >= bits:
            return kind
    raise ModelError(
        f"GGUF has no block type for {bits} bits with zero points.",
        where=name,
        expected=f"symmetric weights of up to 8 bits, or up to {max(types.values())} bits with zero points",
        hint="quantize with sym: true",
    )


def check_blocks(columns: int, group_size: int, name: str) -> None:
    """Raise `ModelError` for ``name`` if a row or its groups do not fill whole blocks."""
    if columns % BLOCK:
        raise ModelError(
            f"A layer {columns} wide is no multiple of {BLOCK}, so GGUF cannot hold it quantized.",
            where=name,
            expected=f"a multiple of {BLOCK}",
            hint="leave the layer in floating point",
        )
    if group_size % BLOCK:
        raise ModelError(
            f"Groups of {group_size} do not fill GGUF's blocks of {BLOCK}.",
            where=name,
            expected=f"group_size a multiple of {BLOCK}, or -1 for a whole row",
            hint=f"quantize with group_size: {BLOCK} or 64",
        )


def pack_blocks(weight: QuantizedWeight, kind: str) -> np.ndarray:
    """Return the rows of ``weight`` [rows, columns] as bytes of type ``kind``: uint8 [rows, `row_bytes`].

    Raises `ValueError` for a type without minima if the zero of the weights is not in the middle.
    """
    if kind in _SIGNED and not weight.symmetric:
        raise ValueError(f"{kind} holds no zero points")
    rows, columns = weight.integers.shape
    groups = np.arange(0, columns, BLOCK) // weight.group_size
    integers = weight.integers.numpy().reshape(rows, -1, BLOCK)
    scales = weight.scales.numpy().astype(np.float32)[:, groups]
    zeros = weight.zero_points.numpy().astype(np.int16)[:, groups]
    parts = [_float16(scales)]
    if kind in _SIGNED:
        centred = integers.astype(np.int16) - zeros[..., None]
        parts.append(_signed(centred, _SIGNED[kind]))
    else:
        parts += [_float16(-zeros * scales), _unsigned(integers, _WITH_MINIMUM[kind])]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _float16(values: np.ndarray) -> np.ndarray:
    """[rows, blocks] -> bytes [rows, blocks, 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def _signed(centred: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return centred.astype(np.int8).view(np.uint8)
    return _unsigned((centred + (1 << (bits - 1))).astype(np.uint8), bits)


def _unsigned(integers: np.ndarray, bits: int) -> np.ndarray:
    """Low halves of weights 0-15 beside those of 16-31 in each byte; fifth bits before them, weight 0 the lowest."""
    low = integers & 0x0F
    packed = low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4
    if bits == 4:
        return packed
    fifth = np.packbits(integers >> 4, axis=-1, bitorder="little")
    return np.concatenate([fifth, packed], axis=-1)


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


def k_type(bits: int, symmetric: bool, columns: int) -> str | None:
    """The type that holds integers of so many bits in rows of so many, and no more bits than needed; None without."""
    if columns % _LENGTH or bits > 3 or (bits == 3 and not symmetric):
        return None
    return "Q3_K" if bits == 3 else "Q2_K"


def pack_k_blocks(weight: QuantizedWeight, kind: str) -> np.ndarray:
    """Return the rows of ``weight`` [rows, columns] as bytes of Q2_K or Q3_K: uint8 [rows, bytes of a row]."""
    rows, columns = weight.integers.shape
    groups = np.arange(0, columns, _PART) // weight.group_size
    shape = (rows, columns // _LENGTH, _LENGTH // _PART)
    scales = weight.scales.numpy().astype(np.float32)[:, groups].reshape(shape)
    zeros = weight.zero_points.numpy().astype(np.float32)[:, groups].reshape(shape)
    integers = weight.integers.numpy().astype(np.int16).reshape(*shape, _PART)
    parts = (
        _q3_k(integers - zeros[..., None].astype(np.int16), scales)
        if kind == "Q3_K"
        else _q2_k(integers, scales, zeros)
    )
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _q3_k(centred: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    step, rounded = _nearest(scales, np.square(centred).sum(-1), -32, 31)
    stored = (rounded + 32).astype(np.uint8)
    low, high = stored & 0x0F, stored >> 4
    fours = high.reshape(*high.shape[:-1], 4, 4)
    packed = [low[..., :8] | low[..., 8:] << 4, sum(fours[..., place, :] << 2 * place for place in range(4))]
    lifted = (centred + 4).astype(np.uint8)
    return [_bits(lifted >> 2, 1), _bits(lifted & 3, 2), *map(np.asarray, packed), _half(step)]


def _q2_k(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> list[np.ndarray]:
    # Scales have no sign there: what falls as its integer rises is counted from the other end.
    turned = np.where(scales[..., None] < 0, 3 - integers, integers)
    spread = np.square(turned - turned.mean(-1, keepdims=True)).sum(-1)
    step, rounded = _nearest(np.abs(scales), spread, 0, 15)
    means = scales * (integers.mean(-1) - zeros)
    wanted = np.maximum(_float(step) * rounded * turned.mean(-1) - means, 0)
    step_of_minima, minima = _nearest(wanted, np.ones_like(wanted), 0, 15)
    packed = rounded.astype(np.uint8) | minima.astype(np.uint8) << 4
    return [packed, _bits(turned.astype(np.uint8), 2), _half(step), _half(step_of_minima)]


def _nearest(values: np.ndarray, counts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """A step [rows, blocks, 1] for ``values`` [rows, blocks, 16], and how many of it come nearest to each of them."""
    largest = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    # Where the largest comes to lie: on the last of the whole numbers or anywhere up to half of it, at either end.
    ends = np.concatenate([np.arange(high, high / 2, -_APART), np.arange(low, low / 2, _APART)])
    best = np.full(largest.shape, np.inf)
    step, rounded = np.zeros_like(largest), np.zeros_like(values)
    for end in ends:
        tried = largest / end
        found = np.clip(np.rint(values / np.where(tried == 0, 1, tried)), low, high) * (tried != 0)
        # With how many there are of it known, the step itself is a matter of least squares.
        below = (counts * np.square(found)).sum(-1, keepdims=True)
        tried = _float((counts * values * found).sum(-1, keepdims=True) / np.where(below == 0, 1, below))
        error = (counts * np.square(values - tried * found)).sum(-1, keepdims=True)
        better = error < best
        best, step = np.where(better, error, best), np.where(better, tried, step)
        rounded = np.where(better, found, rounded)
    return step, rounded


def _float(values: np.ndarray) -> np.ndarray:
    """Return the values rounded to float16."""
    return values.astype(np.float16).astype(np.float32)


def _half(step: np.ndarray) -> np.ndarray:
    """[rows, blocks, 1] -> bytes [rows, blocks, 2]."""
    return step.astype("<f2").view(np.uint8)


def _bits(values: np.ndarray, width: int) -> np.ndarray:
    """Bytes [rows, blocks, 32 * width] of integers [rows, blocks, 16, 16] of ``width`` bits.

    A byte has the integers of one place in each run of 32: of four runs for two bits, of all eight for one.
    """
    runs = values.reshape(*values.shape[:2], -1, 8 // width, 32)
    shifted = [runs[..., place, :] << width * place for place in range(8 // width)]
    packed: np.ndarray = np.bitwise_or.reduce(shifted)
    return packed.reshape(*values.shape[:2], -1)
