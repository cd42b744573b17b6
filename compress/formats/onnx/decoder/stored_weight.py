"""A quantized weight as ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` take it, bit for bit.

The kernels know 2, 4 and 8 bits. Integers of odd bits are stored in planes of 4, 2 and 1 bits, without waste: three
bits are planes of two and one and become four; five are planes of four and one and become eight. ONNX Runtime folds the
operators that reassemble them into a constant before it runs anything.

Weights may also be expanded to float when the graph is opened, for runtimes whose few-bit kernels are slow. ONNX
Runtime's WebAssembly dequantizes a whole weight of `MatMulNBits` in each call, which takes twenty times as long as the
product. An expanded weight is stored as integers of 4 or 8 bits with a plain `Cast`, which ONNX Runtime folds into a
constant once. The folded input stays in memory until the whole graph is open. Scales are therefore not multiplied into
the weights, which would be a second copy, but into the products of each block, which are then summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

INTEGERS = ".weight_Q"
"""Part of the name of a weight's integers, before the number of bits."""
KERNEL_BITS = (2, 4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
_BYTE = 8


@dataclass(frozen=True)
class StoredWeight:
    """Integers ``values`` [rows, blocks * block_size] uint8 below 2**bits, padded where the columns end within a block.

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
        """Number of bits of the kernel that can hold these integers."""
        return min(width for width in KERNEL_BITS if width >= self.bits)

    @property
    def rows(self) -> int:
        """Number of outputs of the product, or entries of the table."""
        return len(self.values)

    @property
    def offset(self) -> int:
        """Difference between the zero of the kernel's wider integers and that of ``values``."""
        return 0 if self.zero_points is not None else (1 << (self.kernel_bits - 1)) - (1 << (self.bits - 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the kernels' integers: [rows, blocks, bytes of a block]."""
        blocks = self.scales.shape[1]
        return self.rows, blocks, self.block_size * self.kernel_bits // 8

    def integers(self) -> np.ndarray:
        """Return the integers as the kernels' bytes."""
        return pack(self.values + np.uint8(self.offset), self.kernel_bits).reshape(self.shape)

    def packed_zero_points(self) -> np.ndarray | None:
        """Return the zero points [rows, ceil(blocks * kernel_bits / 8)] uint8, or None."""
        return None if self.zero_points is None else pack(self.zero_points, self.kernel_bits)

    def can_stack(self, other: StoredWeight) -> bool:
        """Return whether both weights can be rows of one weight."""
        same = self.bits == other.bits and self.block_size == other.block_size and self.columns == other.columns
        return same and (self.zero_points is None) == (other.zero_points is None)


def store(weight: QuantizedWeight, name: str) -> StoredWeight:
    """Return a quantized weight in blocks of a size that the kernels support, with the same integers and scales.

    Groups that are no power of two, or a whole row, become smaller blocks with the same scale. Raises `ModelError` if
    no block size fits.
    """
    rows, columns = weight.integers.shape
    block = _block_size(weight.group_size, columns, name)
    blocks = -(-columns // block)
    # Several blocks share the scale of a group that is larger than a block.
    group_of_block = np.arange(blocks) * block // weight.group_size
    # Padding has the value of zero, so that it contributes nothing.
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
    """Return the rows of several weights as one weight."""
    zeros = [weight.zero_points for weight in weights if weight.zero_points is not None]
    return replace(
        weights[0],
        values=np.concatenate([weight.values for weight in weights]),
        scales=np.concatenate([weight.scales for weight in weights]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers [rows, n] below 2**bits into [rows, ceil(n * bits / 8)] uint8, the first in the low bits."""
    per_byte = 8 // bits
    missing = -values.shape[1] % per_byte
    padded = np.pad(values, ((0, 0), (0, missing))).reshape(len(values), -1, per_byte)
    packed = np.zeros(padded.shape[:2], np.uint8)
    for index in range(per_byte):
        packed |= padded[..., index] << np.uint8(bits * index)
    return packed


def _block_size(group_size: int, columns: int, name: str) -> int:
    """Return the largest power of two that divides the groups, and the row where that leaves blocks large enough."""
    whole_row = group_size >= columns
    block = LARGEST_BLOCK if whole_row else min(group_size & -group_size, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        raise ModelError(
            f"Groups of {group_size} cannot be stored for ONNX Runtime's few-bit kernels.",
            where=name,
            expected=f"a multiple of {SMALLEST_BLOCK}, such as 32, 64 or 128",
            hint="quantize it again with such a group_size",
        )
    fills = min(block, columns & -columns)
    return fills if fills >= SMALLEST_BLOCK else min(block, 32)


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes of integers of so many bits, low bits first: 7 is (4, 2, 1)."""
    return tuple(width for width in (4, 2, 1) if bits & width)


def split_planes(values: np.ndarray, bits: int) -> list[np.ndarray]:
    """Return the planes of integers [rows, n] below 2**bits, each [rows, 1, n * width / 8] uint8.

    A byte holds values that are n * width / 8 apart, so that unpacked values are contiguous.
    """
    planes, shift = [], 0
    for width in plane_widths(bits):
        # The bits of one plane, in as many runs as fit into a byte.
        runs = (values >> shift & (1 << width) - 1).reshape(len(values), _BYTE // width, -1)
        planes.append(pack(runs.swapaxes(1, 2).reshape(len(values), -1), width)[:, None])
        shift += width
    return planes


def join_planes(
    nodes: GraphBuilder, name: str, planes: Sequence[ir.Value], bits: int, shape: tuple[int, int]
) -> ir.Value:
    """Write the operators that restore the integers [rows, n] from their planes.

    Args:
        nodes: The graph.
        name: Name of the weight's module.
        planes: The stored planes, low bits first.
        bits: Number of bits of the integers.
        shape: [rows, n].
    """
    joined: ir.Value | None = None
    shift = 0
    for index, (plane, width) in enumerate(zip(planes, plane_widths(bits), strict=True)):
        scope = f"{name}.plane{index}"
        # A byte is shifted once for each value in it.
        places = np.arange(0, _BYTE, width, dtype=np.uint8)[None, :, None]
        steps = nodes.constant(f"constants.uint8.steps_{width}", places)
        moved = nodes.op("BitShift", scope, [plane, steps], direction="RIGHT")
        masked = nodes.op("BitwiseAnd", scope, [moved, _byte(nodes, (1 << width) - 1)])
        values = nodes.op("Reshape", scope, [masked, nodes.integers(*shape)])
        if joined is not None:
            raised = nodes.op("BitShift", f"{scope}.raised", [values, _byte(nodes, shift)], direction="LEFT")
            values = nodes.op("BitwiseOr", scope, [joined, raised])
        joined, shift = values, shift + width
    assert joined is not None
    return joined


def write_integers(nodes: GraphBuilder, name: str, stored: StoredWeight, planes: bool = True) -> ir.Value:
    """Write the integers for the kernels; bits that the kernels lack are stored in ``planes`` and joined.

    Args:
        nodes: The graph.
        name: Name of the weight's module.
        stored: The weight.
        planes: Whether to store odd bits in planes rather than in the kernels' next width.
    """
    bits, values, nibbles = stored.bits, stored.values, stored.kernel_bits == _BYTE // 2
    if bits == stored.kernel_bits or not planes:
        return nodes.constant(f"{name}{INTEGERS}{stored.kernel_bits}", stored.integers())
    # Two values share a byte; splitting even and odd values keeps those of a byte half a row apart.
    if nibbles:  # the two of a byte come out of the planes half a row apart
        values = np.concatenate([values[:, 0::2], values[:, 1::2]], axis=1)
    parts = [
        nodes.constant(f"{name}{INTEGERS}{bits}_plane{index}", plane)
        for index, plane in enumerate(split_planes(values, bits))
    ]
    joined = join_planes(nodes, name, parts, bits, values.shape)
    # The kernel's zero is the middle of its own, larger range.
    if stored.offset:
        joined = nodes.op("Add", f"{name}.lifted", [joined, _byte(nodes, stored.offset)])
    if nibbles:
        even, odd = nodes.several("Split", f"{name}.pair", [joined], 2, axis=1, num_outputs=2)
        raised = nodes.op("BitShift", f"{name}.pair", [odd, _byte(nodes, 4)], direction="LEFT")
        joined = nodes.op("BitwiseOr", f"{name}.pair", [even, raised])
    return nodes.op("Reshape", f"{name}.blocks", [joined, nodes.integers(*stored.shape)])


def _byte(nodes: GraphBuilder, value: int) -> ir.Value:
    """Store a uint8 scalar."""
    return nodes.constant(f"constants.uint8.{value}", np.array(value, np.uint8))


def typed_integers(stored: StoredWeight, name: str) -> tuple[np.ndarray, ir.DataType]:
    """Return the integers [rows, blocks, block_size] in an ONNX type of as many bits, signed if symmetric.

    Raises `ModelError` for bits or blocks that are not supported.
    """
    symmetric = stored.zero_points is None
    if stored.bits not in (4, 8) or stored.values.shape[1] != stored.columns:
        raise ModelError(
            f"A weight of {stored.bits} bits, {stored.columns} columns in blocks of {stored.block_size}, cannot be "
            "expanded when the graph is opened.",
            where=name,
            expected="4 or 8 bits, and blocks that divide the columns",
            hint="quantize it so, or leave expand_on_load out",
        )
    kind = ir.DataType[f"{'' if symmetric else 'U'}INT{stored.bits}"]
    # Symmetric weights are stored as signed integers, with zero in the middle.
    values = stored.values.astype(np.int16) - ((1 << (stored.bits - 1)) if symmetric else 0)
    return values.reshape(stored.rows, -1, stored.block_size).astype(kind.numpy()), kind


def _as_floats(nodes: GraphBuilder, name: str, stored: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Write integers [blocks, block_size, rows], scales and zero points [blocks, 1, rows] as floats."""
    blocks, kind = typed_integers(stored, name)
    integers = nodes.constant(f"{name}{INTEGERS}{stored.bits}", blocks.transpose(1, 2, 0), kind)
    scales = nodes.constant(f"{name}.weight_scales", stored.scales.T[:, None])
    zeros = None
    if stored.zero_points is not None:
        held = nodes.constant(f"{name}.weight_zero_points", stored.zero_points.T[:, None])
        zeros = nodes.op("Cast", f"{name}.zero_points", [held], to=ir.DataType.FLOAT)
    integers = nodes.op("Cast", f"{name}.integers", [integers], to=ir.DataType.FLOAT)
    return integers, nodes.op("Cast", f"{name}.scales", [scales], to=ir.DataType.FLOAT), zeros


def multiply_expanded(nodes: GraphBuilder, name: str, value: ir.Value, stored: StoredWeight) -> ir.Value:
    """Write the products [batch, length, rows] of ``value`` [batch, length, columns] and a weight, block by block.

    Args:
        nodes: The graph.
        name: Name of the weight's module.
        value: Left operand.
        stored: The weight.

    Raises:
        ModelError: Bits or blocks are not supported.
    """
    integers, scales, zeros = _as_floats(nodes, name, stored)
    # The input is split into blocks along the columns.
    shape = nodes.integers(0, 0, stored.scales.shape[1], stored.block_size)
    blocks = nodes.op("Reshape", f"{name}.blocks", [value, shape])
    turned = nodes.op("Transpose", f"{name}.blocks", [blocks], perm=[0, 2, 1, 3])
    products = nodes.op("MatMul", name, [turned, integers])
    # The zero points contribute the sum of each block's inputs times its zero point.
    if zeros is not None:
        sums = nodes.op("ReduceSum", f"{name}.zeros", [turned, nodes.integers(-1)], keepdims=1)
        products = nodes.op("Sub", name, [products, nodes.op("Mul", f"{name}.zeros", [sums, zeros])])
    scaled = nodes.op("Mul", name, [products, scales])
    return nodes.op("ReduceSum", name, [scaled, nodes.integers(1)], keepdims=0)


def expand_weight(nodes: GraphBuilder, name: str, stored: StoredWeight) -> ir.Value:
    """Write the weight [columns, rows] with its scales.

    It takes more memory than blocks while the graph is opened, but no memory for products of blocks: those of a
    prompt's logits would be many times as large as the logits. Raises `ModelError` as `multiply_expanded` does.
    """
    integers, scales, zeros = _as_floats(nodes, name, stored)
    if zeros is not None:
        integers = nodes.op("Sub", f"{name}.weight", [integers, zeros])
    scaled = nodes.op("Mul", f"{name}.weight", [integers, scales])
    return nodes.op("Reshape", f"{name}.weight", [scaled, nodes.integers(stored.columns, stored.rows)])
