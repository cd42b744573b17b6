"""Packing of quantized weights into llama.cpp's blocks, and rounding of floats to block types by ggml itself.

Blocks of 32 keep integers and scales unchanged, in the layout of ggml-common.h. Q4_0 and Q8_0 hold `integer *
scale`; Q4_1 and Q5_1 hold `integer * scale + minimum`, with scale and minimum in float16. A group of 64 becomes two
blocks with the same scale. Symmetric weights are stored exactly. Only minima are rounded, because `-zero * scale`
may need more than float16's 11 bits.
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

    Two and three bits go into a type of four, which is exact but no smaller.
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
