"""Quantized weights as llama.cpp's blocks of 32: the same integers and scales, packed as ggml-common.h lays them out.

Q4_0 and Q8_0 hold `integer * scale`, Q4_1 and Q5_1 `integer * scale + minimum`, with scale and minimum in float16. A
group of 64 becomes two blocks with the same scale. What has its zero in the middle of the range is kept to the bit;
minima are the one thing that is rounded (`-zero * scale` may need more than float16's 11 bits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight

BLOCK = 32
"""Weights of a row that share a scale in every type that stores our integers unchanged."""
_SIGNED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_WITH_MINIMUM = {"Q4_1": 4, "Q5_1": 5}


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
