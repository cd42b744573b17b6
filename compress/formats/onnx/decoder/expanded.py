"""Few-bit weights that become float when a graph is opened, for runtimes whose few-bit kernels are slow.

ONNX Runtime's WebAssembly makes a whole weight of `MatMulNBits` float in each call, which takes it twenty times as long
as the product. Here integers of 4 or 8 bits have a plain `Cast` behind them, which ONNX Runtime folds into a constant
once. What is folded stays beside its result until the whole graph is open, so that scales are not multiplied into the
weights, which would be a second copy, but into the products of each block, which are then added up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import Nodes
from compress.formats.onnx.decoder.stored_weight import INTEGERS, StoredWeight
from compress.utils.errors import ModelError


def typed(stored: StoredWeight, name: str) -> tuple[np.ndarray, ir.DataType]:
    """The integers [rows, blocks, block_size] in a type of ONNX's of as many bits, about zero if they have no other.

    Raises `ModelError` for bits or blocks that don't fit.
    """
    symmetric = stored.zero_points is None
    if stored.bits not in (4, 8) or stored.values.shape[1] != stored.columns:
        raise ModelError(
            f"A weight of {stored.bits} bits, {stored.columns} columns in blocks of {stored.block_size}, cannot be "
            "made float when the graph is opened.",
            where=name,
            expected="4 or 8 bits, and blocks that divide the columns",
            hint="quantize it so, or leave expand_on_load out",
        )
    kind = ir.DataType[f"{'' if symmetric else 'U'}INT{stored.bits}"]
    values = stored.values.astype(np.int16) - ((1 << (stored.bits - 1)) if symmetric else 0)
    return values.reshape(stored.rows, -1, stored.block_size).astype(kind.numpy()), kind


def _as_floats(nodes: Nodes, name: str, stored: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Integers [blocks, block_size, rows], scales and zero points [blocks, 1, rows]; raises as `typed` does."""
    blocks, kind = typed(stored, name)
    integers = nodes.constant(f"{name}{INTEGERS}{stored.bits}", blocks.transpose(1, 2, 0), kind)
    scales = nodes.constant(f"{name}.weight_scales", stored.scales.T[:, None])
    zeros = None
    if stored.zero_points is not None:
        held = nodes.constant(f"{name}.weight_zero_points", stored.zero_points.T[:, None])
        zeros = nodes.op("Cast", f"{name}.zero_points", [held], to=ir.DataType.FLOAT)
    integers = nodes.op("Cast", f"{name}.integers", [integers], to=ir.DataType.FLOAT)
    return integers, nodes.op("Cast", f"{name}.scales", [scales], to=ir.DataType.FLOAT), zeros


def multiply(nodes: Nodes, name: str, value: ir.Value, stored: StoredWeight) -> ir.Value:
    """The products [batch, length, rows] of ``value`` [batch, length, columns] with a weight, block by block.

    Raises `ModelError` for bits or blocks that don't fit.
    """
    integers, scales, zeros = _as_floats(nodes, name, stored)
    shape = nodes.integers(0, 0, stored.scales.shape[1], stored.block_size)
    apart = nodes.op("Reshape", f"{name}.blocks", [value, shape])
    turned = nodes.op("Transpose", f"{name}.blocks", [apart], perm=[0, 2, 1, 3])
    products = nodes.op("MatMul", name, [turned, integers])
    if zeros is not None:
        sums = nodes.op("ReduceSum", f"{name}.zeros", [turned, nodes.integers(-1)], keepdims=1)
        products = nodes.op("Sub", name, [products, nodes.op("Mul", f"{name}.zeros", [sums, zeros])])
    scaled = nodes.op("Mul", name, [products, scales])
    return nodes.op("ReduceSum", name, [scaled, nodes.integers(1)], keepdims=0)


def whole(nodes: Nodes, name: str, stored: StoredWeight) -> ir.Value:
    """The weight [columns, rows] with its scales: more memory while the graph is opened, none for products of blocks.

    So long a product as the logits of a prompt would be many times as large block by block. Raises as `multiply` does.
    """
    integers, scales, zeros = _as_floats(nodes, name, stored)
    if zeros is not None:
        integers = nodes.op("Sub", f"{name}.weight", [integers, zeros])
    scaled = nodes.op("Mul", f"{name}.weight", [integers, scales])
    return nodes.op("Reshape", f"{name}.weight", [scaled, nodes.integers(stored.columns, stored.rows)])
