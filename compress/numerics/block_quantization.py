"""Round-to-nearest quantization: in blocks along a row with scale and zero point, or on one coarse grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GRID = np.linspace(1.0, 0.75, 11)
_AT_ONCE = 1 << 17
"""Elements that are quantized at a time."""


@dataclass(frozen=True)
class QuantizedBlocks:
    """Quantized matrix with ``weight ~ (integers - zero_points) * scales`` in each block.

    ``integers`` is [rows, columns] uint8; ``scales`` float32 and ``zero_points`` uint8 are [rows, columns / block].
    """

    integers: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    block_size: int

    def dequantize(self) -> np.ndarray:
        """Return the float32 weights [rows, columns] that the integers represent."""
        rows = self.integers.shape[0]
        blocks = self.integers.reshape(rows, -1, self.block_size).astype(np.float32)
        return np.asarray(((blocks - self.zero_points[..., None]) * self.scales[..., None]).reshape(rows, -1))


def quantize_blocks(weight: np.ndarray, bits: int, block_size: int) -> QuantizedBlocks:
    """Quantize ``weight`` [rows, columns] with ``bits`` <= 8; columns must be a multiple of ``block_size``.

    Each block takes the range with the least squared error out of eleven, from the full range to three quarters of it.
    Clipping pays at few bits; at eight bits the full range nearly always wins.
    """
    rows, columns = weight.shape
    if columns % block_size:
        raise ValueError(f"{columns} columns are not a multiple of the block size {block_size}")
    # As many at a time as stay in a processor's cache.
    count = max(1, weight.size // _AT_ONCE)
    # Integers, scales and zero points of ``blocks`` [rows, blocks, elements].
    quantized: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for part in np.array_split(weight.reshape(rows, -1, block_size), count):
        blocks = part
        blocks = blocks.astype(np.float32)
        low = np.minimum(blocks.min(axis=-1), 0.0)
        high = np.maximum(blocks.max(axis=-1), 0.0)
        best = _round(blocks, low, high, bits)
        least = _squared_error(blocks, *best)
        # Keep for each block the range with the least error.
        for share in _GRID[1:]:
            candidate = _round(blocks, low * share, high * share, bits)
            error = _squared_error(blocks, *candidate)
            better = error < least
            least = np.where(better, error, least)
            best = (
                np.where(better[..., None], candidate[0], best[0]),
                np.where(better, candidate[1], best[1]),
                np.where(better, candidate[2], best[2]),
            )
        quantized.append(best)
    integers, scales, zero_points = (np.concatenate(parts) for parts in zip(*quantized, strict=True))
    return QuantizedBlocks(integers.reshape(rows, columns), scales, zero_points, block_size)


def _round(
    blocks: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    levels = 2**bits - 1
    scales = ((high - low) / levels).astype(np.float32)
    # A block of zeros gets the scale 1.
    scales = np.where(scales == 0, np.float32(1), scales)
    zero_points = np.clip(np.rint(-low / scales), 0, levels)
    integers = np.clip(np.rint(blocks / scales[..., None]) + zero_points[..., None], 0, levels)
    return integers.astype(np.uint8), scales, zero_points.astype(np.uint8)


def _squared_error(blocks: np.ndarray, integers: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    restored = (integers.astype(np.float32) - zero_points[..., None]) * scales[..., None]
    return np.asarray(np.square(restored - blocks).sum(axis=-1))


def pack_nibbles(integers: np.ndarray) -> np.ndarray:
    """Pack two 4-bit integers per byte along the last axis, low half first: [..., n] -> [..., ceil(n / 2)]."""
    # Pad to an even number.
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray((integers[..., 0::2] | (integers[..., 1::2] << 4)).astype(np.uint8))


_BLOCK = 32


def on_coarse_grid(values: np.ndarray, bits: int) -> np.ndarray:
    """Return ``values`` rounded to float16 for 16 bits, else to 2^bits levels between the extremes and 0.

    One grid spans all values; for convolution weights (three axes or more) one output channel; below 8 bits a block of
    32 in a row.
    """
    if bits >= 32:
        return values
    if bits == 16:
        return values.astype(np.float16).astype(values.dtype)
    # Pad rows to whole blocks, and remove the padding afterwards.
    if bits < 8:
        blocks = np.pad(values.reshape(-1, values.shape[-1]), ((0, 0), (0, -values.shape[-1] % _BLOCK)))
        rounded = _on_grid(blocks.reshape(-1, _BLOCK), bits).reshape(blocks.shape)[:, : values.shape[-1]]
        return rounded.reshape(values.shape)
    # Convolution weights have a grid per output channel.
    rows = values.reshape(len(values), -1) if values.ndim > 2 else values.reshape(1, -1)
    return _on_grid(rows, bits).reshape(values.shape)


def _on_grid(rows: np.ndarray, bits: int) -> np.ndarray:
    """Round each row of [n, m] on its own grid."""
    low, high = np.minimum(rows.min(axis=1, keepdims=True), 0), np.maximum(rows.max(axis=1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    step[step == 0] = 1
    return np.asarray((np.rint(rows / step) * step).astype(rows.dtype))
