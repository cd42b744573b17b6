"""Few-bit weights that become float when a graph is opened, for runtimes whose few-bit kernels are slow.

ONNX Runtime's WebAssembly makes a whole weight of `MatMulNBits` float in each call, which takes it twenty times as long
as the product. Here integers of 4 or 8 bits have a plain `Cast` behind them, which ONNX Runtime folds into a constant
once. What is folded stays beside its result until the whole graph is open, so that scales are not multiplied into the
weights, which would be a second copy, but into the products of each block, which are then added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from compress.errors import ModelError
from compress.formats.onnx.decoder.nodes import Nodes
from compress.formats.onnx.decoder.stored_weight import INTEGERS, StoredWeight

_TYPES = {
    (4, True): (np.dtype(ml_dtypes.int4), ir.DataType.INT4),
    (4, False): (np.dtype(ml_dtypes.uint4), ir.DataType.UINT4),
    (8, True): (np.dtype(np.int8), ir.DataType.INT8),
    (8, False): (np.dtype(np.uint8), ir.DataType.UINT8),
}
"""By the bits, and whether the middle of the integers is zero."""


@dataclass(frozen=True)
class Expanded:
    """``integers`` [blocks, block_size, rows], ``scales`` and ``zeros`` [blocks, 1, rows], all as floats."""

    stored: StoredWeight
    integers: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


def typed(stored: StoredWeight, name: str) -> tuple[np.ndarray, ir.DataType]:
    """The integers [rows, blocks, block_size] in a type of ONNX's of as many bits, about zero if they have no other.

    Raises `ModelError` for bits or blocks that don't fit.
    """
    symmetric = stored.zero_points is None
    kinds = _TYPES.get((stored.bits, symmetric))
    if kinds is None or stored.values.shape[1] != stored.columns:
        raise ModelError(
            f"A weight of {stored.bits} bits, {stored.columns} columns in blocks of {stored.block_size}, cannot be "
            "made float when the graph is opened.",
            where=name,
            expected="4 or 8 bits, and blocks that divide the columns",
            mend="quantize it so, or leave expand_on_load out",
        )
    dtype, kind = kinds
    values = stored.values.astype(np.int16) - ((1 << (stored.bits - 1)) if symmetric else 0)
    return values.reshape(stored.rows, -1, stored.block_size).astype(dtype), kind


def expand(nodes: Nodes, name: str, stored: StoredWeight) -> Expanded:
    """A weight whose constants are stored in few bits. Raises `ModelError` for bits or blocks that don't fit."""
    blocks, kind = typed(stored, name)
    integers = nodes.constant(f"{name}{INTEGERS}{stored.bits}", blocks.transpose(1, 2, 0), kind)
    scales = nodes.constant(f"{name}.weight_scales", stored.scales.T[:, None])
    zeros = None
    if stored.zero_points is not None:
        held = nodes.constant(f"{name}.weight_zero_points", stored.zero_points.T[:, None])
        zeros = nodes.op("Cast", f"{name}.zero_points", [held], to=ir.DataType.FLOAT)
    return Expanded(
        stored,
        nodes.op("Cast", f"{name}.integers", [integers], to=ir.DataType.FLOAT),
        nodes.op("Cast", f"{name}.scales", [scales], to=ir.DataType.FLOAT),
        zeros,
    )


def multiply(nodes: Nodes, scope: str, value: ir.Value, weight: Expanded) -> ir.Value:
    """The products [batch, length, rows] of ``value`` [batch, length, columns], block by block."""
    stored = weight.stored
    blocks, size = stored.scales.shape[1], stored.block_size
    apart = nodes.op("Reshape", f"{scope}.blocks", [value, nodes.integers(0, 0, blocks, size)])
    turned = nodes.op("Transpose", f"{scope}.blocks", [apart], perm=[0, 2, 1, 3])
    products = nodes.op("MatMul", scope, [turned, weight.integers])
    if weight.zeros is not None:
        sums = nodes.op("ReduceSum", f"{scope}.zeros", [turned, nodes.integers(-1)], keepdims=1)
        products = nodes.op("Sub", scope, [products, nodes.op("Mul", f"{scope}.zeros", [sums, weight.zeros])])
    scaled = nodes.op("Mul", scope, [products, weight.scales])
    return nodes.op("ReduceSum", scope, [scaled, nodes.integers(1)], keepdims=0)


def whole(nodes: Nodes, scope: str, weight: Expanded) -> ir.Value:
    """The weight [columns, rows] with its scales: more memory while the graph is opened, none for products of blocks.

    So long a product as the logits of a prompt would be many times as large block by block.
    """
    integers = weight.integers
    if weight.zeros is not None:
        integers = nodes.op("Sub", f"{scope}.weight", [integers, weight.zeros])
    scaled = nodes.op("Mul", f"{scope}.weight", [integers, weight.scales])
    shape = nodes.integers(weight.stored.columns, weight.stored.rows)
    return nodes.op("Reshape", f"{scope}.weight", [scaled, shape])
