"""Integers of two and three bits as llama.cpp's blocks of 256, whose scales are few bits themselves.

The integers stay as they are. Q3_K holds `integer * step * scale` with 16 scales of 6 bits and their step in float16;
Q2_K `integer * step * scale - other step * minimum`, scales and minima of 4 bits (ggml-common.h, ggml-quants.c). The
step is the one of several by which the scales, weighed by what hangs on them, are rounded least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight

K_TYPES = ("Q2_K", "Q3_K")
_LENGTH, _PART = 256, 16
"""Weights of a block, and those that share a scale."""
_APART = 0.5
"""How far the steps that are tried lie from each other, in whole numbers of them."""


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
