"""Packing of quantized weights into llama.cpp's blocks, and rounding of floats to block types by ggml itself.

Blocks of 32 keep integers and scales unchanged, in the layout of ggml-common.h. Q4_0 and Q8_0 hold `integer *
scale`; Q4_1 and Q5_1 hold `integer * scale + minimum`, with scale and minimum in float16. A group of 64 becomes two
blocks with the same scale. Symmetric weights are stored exactly. Only minima are rounded, because `-zero * scale`
may need more than float16's 11 bits.

Blocks of 256 hold integers of two and three bits with quantized scales (ggml-quants.c). The integers stay unchanged.
Q3_K holds `integer * step * scale` with 16 scales of 6 bits and a float16 step. Q2_K holds `integer * step * scale -
minimum_step * minimum`, with scales and minima of 4 bits. Of several steps, the one with the smallest weighted
rounding error of the scales is chosen.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.gguf.llama_cpp_library import library
from compress.utils.environment import granted_cores
from compress.utils.errors import ModelError, StageError

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight


BLOCK = 32
"""Weights per scale in every type that stores our integers unchanged."""
_SIGNED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_WITH_MINIMUM = {"Q4_1": 4, "Q5_1": 5}

_AT_ONCE = 1 << 16
"""Number of weights that a thread rounds per call."""
_FLOATS = ctypes.POINTER(ctypes.c_float)

K_TYPES = ("Q2_K", "Q3_K")
_LENGTH, _PART = 256, 16
"""Weights of a block, and weights that share a scale."""
_APART = 0.5
"""Distance between the tried positions of the largest scale, in quantization levels."""


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
    parts = [_float16_bytes(scales)]
    if kind in _SIGNED:
        centred, bits = integers.astype(np.int16) - zeros[..., None], _SIGNED[kind]
        if bits == 8:
            parts.append(centred.astype(np.int8).view(np.uint8))
        else:
            parts.append(_pack_bits((centred + (1 << (bits - 1))).astype(np.uint8), bits))
    else:
        parts += [_float16_bytes(-zeros * scales), _pack_bits(integers, _WITH_MINIMUM[kind])]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _float16_bytes(values: np.ndarray) -> np.ndarray:
    """Return [rows, blocks] as bytes [rows, blocks, 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def _pack_bits(integers: np.ndarray, bits: int) -> np.ndarray:
    """Return integers [..., 32] as bytes with weights 0-15 in the low halves, after their fifth bits."""
    low = integers & 0x0F
    packed = low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4
    if bits == 4:
        return packed
    return np.concatenate([np.packbits(integers >> 4, axis=-1, bitorder="little"), packed], axis=-1)


def quantize_rows(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Round rows to a block type with ggml.

    Args:
        values: Weights [rows, columns].
        kind: Block type.
        importance: Weight of each column's error [columns], or None.

    Returns:
        Blocks, uint8 [rows, bytes of a row].

    Raises:
        StageError: ggml fails.
        MissingExtraError: ggml is not installed.
    """
    from gguf import GGMLQuantizationType

    ggml, number = library(), int(GGMLQuantizationType[kind])
    values = np.ascontiguousarray(values, dtype=np.float32)
    column_weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    importance_pointer = None if column_weights is None else column_weights.ctypes.data_as(_FLOATS)
    rows, columns = values.shape
    blocks = np.empty((rows, row_bytes(kind, columns)), dtype=np.uint8)
    step = max(1, _AT_ONCE // columns)

    def quantize(start: int) -> int:
        source, target = values.ctypes.data_as(_FLOATS), blocks.ctypes.data_as(ctypes.c_void_p)
        size = start * columns, min(step, rows - start), columns
        return int(ggml.ggml_quantize_chunk(number, source, target, *size, importance_pointer))

    # The first call builds tables that the other threads read.
    written_bytes = quantize(0)
    with ThreadPoolExecutor(len(granted_cores())) as pool:
        written_bytes += sum(pool.map(quantize, range(step, rows, step)))
    if written_bytes != blocks.nbytes:
        written = f"{written_bytes:,} bytes of {kind}"
        raise StageError(f"llama.cpp rounded to {written}, where {blocks.nbytes:,} were expected.")
    return blocks


def k_type(bits: int, symmetric: bool, columns: int) -> str | None:
    """Return the type that holds integers of ``bits`` bits without unused bits, or None if there is none."""
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
    if kind == "Q3_K":
        parts = _pack_q3_k(integers - zeros[..., None].astype(np.int16), scales)
    else:
        parts = _pack_q2_k(integers, scales, zeros)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _pack_q3_k(centred: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    step, rounded = _fit_step(scales, np.square(centred).sum(-1), -32, 31)
    stored, unsigned = (rounded + 32).astype(np.uint8), (centred + 4).astype(np.uint8)
    low_bits, quarters = stored & 0x0F, (stored >> 4).reshape(*stored.shape[:-1], 4, 4)
    return [
        _interleave_bits(unsigned >> 2, 1),
        _interleave_bits(unsigned & 3, 2),
        low_bits[..., :8] | low_bits[..., 8:] << 4,
        np.bitwise_or.reduce([quarters[..., position, :] << 2 * position for position in range(4)]),
        _float16_bytes(step[..., 0]),
    ]


def _pack_q2_k(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> list[np.ndarray]:
    # Scales have no sign in Q2_K, so integers with a negative scale are counted from the other end.
    reflected = np.where(scales[..., None] < 0, 3 - integers, integers)
    spread = np.square(reflected - reflected.mean(-1, keepdims=True)).sum(-1)
    step, rounded = _fit_step(np.abs(scales), spread, 0, 15)
    means = scales * (integers.mean(-1) - zeros)
    target_minima = np.maximum(_float(step) * rounded * reflected.mean(-1) - means, 0)
    step_of_minima, minima = _fit_step(target_minima, np.ones_like(target_minima), 0, 15)
    packed = rounded.astype(np.uint8) | minima.astype(np.uint8) << 4
    steps = [_float16_bytes(step[..., 0]), _float16_bytes(step_of_minima[..., 0])]
    return [packed, _interleave_bits(reflected.astype(np.uint8), 2), *steps]


def _fit_step(values: np.ndarray, counts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a step [rows, blocks, 1] for ``values`` [rows, blocks, 16], and the nearest integer multiples of it.

    Args:
        values: Scales or minima.
        counts: Weight of each value's squared error.
        low: Smallest multiple.
        high: Largest multiple.
    """
    largest = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    # The largest value may be mapped to the last level or anywhere down to half of it, at either end.
    positions = np.concatenate([np.arange(high, high / 2, -_APART), np.arange(low, low / 2, _APART)])
    best = np.full(largest.shape, np.inf)
    step, rounded = np.zeros_like(largest), np.zeros_like(values)
    for end in positions:
        candidate = largest / end
        multiples = np.clip(np.rint(values / np.where(candidate == 0, 1, candidate)), low, high) * (candidate != 0)
        # With the multiples fixed, the best step is a least-squares solution.
        numerator = (counts * values * multiples).sum(-1, keepdims=True)
        denominator = (counts * np.square(multiples)).sum(-1, keepdims=True)
        candidate = _float(numerator / np.where(denominator == 0, 1, denominator))
        error = (counts * np.square(values - candidate * multiples)).sum(-1, keepdims=True)
        better = error < best
        best, step = np.where(better, error, best), np.where(better, candidate, step)
        rounded = np.where(better, multiples, rounded)
    return step, rounded


def _float(values: np.ndarray) -> np.ndarray:
    """Return the values quantize_rows to float16."""
    return values.astype(np.float16).astype(np.float32)


def _interleave_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Return integers [rows, blocks, 16, 16] of ``width`` bits as bytes [rows, blocks, 32 * width].

    A byte contains the integers at one position of each run of 32: of four runs for two bits, of eight for one bit.
    """
    runs = values.reshape(*values.shape[:2], -1, 8 // width, 32)
    shifted = [runs[..., position, :] << width * position for position in range(8 // width)]
    packed: np.ndarray = np.bitwise_or.reduce(shifted)
    return packed.reshape(*values.shape[:2], -1)
