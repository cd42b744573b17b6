"""Integers of odd bits without waste: on disk in planes of 4, 2 and 1 bits, put together when a graph is loaded.

The kernels know 2, 4 and 8 bits. Three bits are stored as planes of two and one and become four; five are stored as
four and one and become eight. ONNX Runtime folds the operators that do so into a constant before it runs anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import Nodes

KERNEL_BITS = (2, 4, 8)
_BYTE = 8


def widths(bits: int) -> tuple[int, ...]:
    """The planes of integers of so many bits, the low ones first: 7 is (4, 2, 1)."""
    return tuple(width for width in (4, 2, 1) if bits & width)


def split(values: np.ndarray, bits: int) -> list[np.ndarray]:
    """The planes of [rows, n] integers below 2**bits, each [rows, 1, n * width / 8] uint8.

    A byte holds values that lie n * width / 8 apart, so that they are laid side by side without being woven.
    """
    planes, place = [], 0
    for width in widths(bits):
        runs = (values >> place & (1 << width) - 1).reshape(len(values), _BYTE // width, -1)
        packed = np.zeros((len(values), 1, runs.shape[2]), np.uint8)
        for index in range(_BYTE // width):
            packed[:, 0] |= runs[:, index] << np.uint8(index * width)
        planes.append(packed)
        place += width
    return planes


def join(nodes: Nodes, name: str, planes: Sequence[ir.Value], bits: int, shape: tuple[int, int]) -> ir.Value:
    """The operators that make the integers [rows, n] of their planes again."""
    whole: ir.Value | None = None
    place = 0
    for index, (plane, width) in enumerate(zip(planes, widths(bits), strict=True)):
        scope = f"{name}.plane{index}"
        places = np.arange(0, _BYTE, width, dtype=np.uint8)[None, :, None]
        steps = nodes.constant(f"constants.uint8.steps_{width}", places)
        moved = nodes.op("BitShift", scope, [plane, steps], direction="RIGHT")
        masked = nodes.op("BitwiseAnd", scope, [moved, _byte(nodes, (1 << width) - 1)])
        values = nodes.op("Reshape", scope, [masked, nodes.integers(*shape)])
        if whole is not None:
            raised = nodes.op("BitShift", f"{scope}.raised", [values, _byte(nodes, place)], direction="LEFT")
            values = nodes.op("BitwiseOr", scope, [whole, raised])
        whole, place = values, place + width
    assert whole is not None
    return whole


def lift(nodes: Nodes, name: str, values: ir.Value, by: int) -> ir.Value:
    """The integers with ``by`` added to each of them."""
    return values if by == 0 else nodes.op("Add", f"{name}.lifted", [values, _byte(nodes, by)])


def pair(nodes: Nodes, name: str, values: ir.Value) -> ir.Value:
    """[rows, n] four-bit integers, those of even place before those of odd place, as [rows, n / 2] bytes."""
    even, odd = nodes.several("Split", f"{name}.pair", [values], 2, axis=1, num_outputs=2)
    raised = nodes.op("BitShift", f"{name}.pair", [odd, _byte(nodes, 4)], direction="LEFT")
    return nodes.op("BitwiseOr", f"{name}.pair", [even, raised])


def _byte(nodes: Nodes, value: int) -> ir.Value:
    return nodes.constant(f"constants.uint8.{value}", np.array(value, np.uint8))
