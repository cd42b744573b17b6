"""A quantized weight as ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` take it, to the last integer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import ModelError
from compress.formats.onnx.decoder.bit_planes import KERNEL_BITS
from compress.numerics.integer_grid import QuantizedWeight

INTEGERS = ".weight_Q"
"""Stands before the bits in the name of what holds a weight's integers."""
SMALLEST_BLOCK = 16
LARGEST_BLOCK = 256


@dataclass(frozen=True)
class StoredWeight:
    """``values`` [rows, blocks * block_size] uint8 below 2**bits, padded where the columns end within a block.

    ``scales`` [rows, blocks] float16; ``zero_points`` [rows, blocks] uint8, or None where each is 2**(bits - 1).
    """

    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    block_size: int
    columns: int

    @property
    def kernel_bits(self) -> int:
        """The width that the kernels have for these bits."""
        return min(width for width in KERNEL_BITS if width >= self.bits)

    @property
    def rows(self) -> int:
        """Outputs of the product, or entries of the table."""
        return len(self.values)

    @property
    def lift(self) -> int:
        """What the kernels' integers are larger by: their middle is that of their own width."""
        return 0 if self.zero_points is not None else (1 << (self.kernel_bits - 1)) - (1 << (self.bits - 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[rows, blocks, bytes of a block], as the kernels take the integers."""
        blocks = self.scales.shape[1]
        return self.rows, blocks, self.block_size * self.kernel_bits // 8

    def integers(self) -> np.ndarray:
        """The kernels' bytes."""
        return pack(self.values + np.uint8(self.lift), self.kernel_bits).reshape(self.shape)

    def packed_zero_points(self) -> np.ndarray | None:
        """[rows, ceil(blocks * kernel_bits / 8)] uint8, or None."""
        return None if self.zero_points is None else pack(self.zero_points, self.kernel_bits)

    def joins(self, other: StoredWeight) -> bool:
        """Whether both can be the rows of one weight."""
        same = self.bits == other.bits and self.block_size == other.block_size and self.columns == other.columns
        return same and (self.zero_points is None) == (other.zero_points is None)


def store(weight: QuantizedWeight, name: str) -> StoredWeight:
    """The same integers and scales in blocks. Raises `ModelError` where no block size serves.

    Groups that are no power of two, or a whole row, become smaller blocks with the same scale.
    """
    rows, columns = weight.integers.shape
    block = _block_size(weight.group_size, columns, name)
    blocks = -(-columns // block)
    group_of_block = np.arange(blocks) * block // weight.group_size
    values = np.full((rows, blocks * block), 1 << (weight.bits - 1), np.uint8)
    values[:, :columns] = weight.integers.numpy()
    return StoredWeight(
        values=values,
        scales=weight.scales.numpy()[:, group_of_block].astype(np.float16),
        zero_points=None if weight.symmetric else weight.zero_points.numpy()[:, group_of_block],
        bits=weight.bits,
        block_size=block,
        columns=columns,
    )


def stack(weights: Sequence[StoredWeight]) -> StoredWeight:
    """The rows of several weights that join, one below the other."""
    zeros = [weight.zero_points for weight in weights if weight.zero_points is not None]
    return replace(
        weights[0],
        values=np.concatenate([weight.values for weight in weights]),
        scales=np.concatenate([weight.scales for weight in weights]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] integers below 2**bits -> [rows, ceil(n * bits / 8)] uint8, the first in the low bits."""
    each = 8 // bits
    missing = -values.shape[1] % each
    padded = np.pad(values, ((0, 0), (0, missing))).reshape(len(values), -1, each)
    packed = np.zeros(padded.shape[:2], np.uint8)
    for index in range(each):
        packed |= padded[..., index] << np.uint8(bits * index)
    return packed


def _block_size(group_size: int, columns: int, name: str) -> int:
    """The largest power of two that no border of a group cuts, and that fills the row if one does."""
    whole = group_size >= columns
    block = LARGEST_BLOCK if whole else min(group_size & -group_size, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        raise ModelError(
            f"Groups of {group_size} cannot be stored for ONNX Runtime's few-bit kernels.",
            where=name,
            expected=f"a multiple of {SMALLEST_BLOCK}, such as 32, 64 or 128",
            mend="quantize it again with such a group_size",
        )
    fills = min(block, columns & -columns)
    return fills if fills >= SMALLEST_BLOCK else min(block, 32)
